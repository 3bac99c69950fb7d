"""What a request with a layout has to be; pure. The HTTP process asks before it sends one on, the scheduler again.

An exception in the scheduler ends the server for everybody, so nothing gets there that was not looked at here.
"""

from __future__ import annotations

from typing import Any

from sgl_apr.server.kv_join.cache_keys import NAMESPACE_PREFIX, lookup_cost
from sgl_apr.trajectory.join_layout import LAYOUT_PARAM, Layout, LayoutError, parse_layout

MAX_LAYOUT_CHARS = 1 << 16  # of the JSON
MAX_LOOKUP_COST = 1 << 23  # tokens looked at to find all parts of one prompt, in a tenth of a second

# Where keys and values depend on more than the ids and the layout, or a prompt is more than its ids. By the
# names that they have in the HTTP process and in the scheduler.
UNSUPPORTED_FIELDS = {
    "input_embeds": "input embeddings",
    "positional_embed_overrides": "embeddings of its own",
    "mm_inputs": "images, video or audio",
    "multimodal_inputs": "images, video or audio",
    "token_type_ids": "token types",
    "session_params": "a session",
    "session": "a session",
    "multi_item_delimiter_indices": "items to score",
    "token_indices_to_pool": "tokens to pool",
}


def has_layout(request: Any) -> bool:
    """Whether a tokenized request, or one of the scheduler, asks for a join."""
    params = request.sampling_params.custom_params
    return isinstance(params, dict) and LAYOUT_PARAM in params


def layout_of_request(request: Any, tokens: int) -> Layout:
    """The layout of a request that has one, of a prompt of so many tokens; raises LayoutError."""
    for name, what in UNSUPPORTED_FIELDS.items():
        if getattr(request, name, None) is not None:
            raise LayoutError(f"a joined prompt cannot have {what}")
    if (request.sampling_params.beam_width or 1) > 1:
        raise LayoutError("a joined prompt cannot be searched with beams")
    if request.return_logprob and 0 <= request.logprob_start_len < tokens:
        raise LayoutError("a joined prompt is not computed again: expected no log-probabilities of it")
    text = request.sampling_params.custom_params[LAYOUT_PARAM]
    if not isinstance(text, str) or len(text) > MAX_LAYOUT_CHARS:
        raise LayoutError(f"expected the layout as JSON in a string of at most {MAX_LAYOUT_CHARS} characters")
    layout = parse_layout(text, tokens)
    if (found := lookup_cost(layout)) > MAX_LOOKUP_COST:
        raise LayoutError(
            f"branches and what is before each have {found} tokens, expected at most {MAX_LOOKUP_COST}"
        )
    return layout


def validate_request(asked: Any, request: Any, joins: bool) -> None:
    """Raises LayoutError for what the scheduler must not see: `asked` by a client, `request` is it tokenized.

    `joins` is whether the server has the cache that joins.
    """
    if (getattr(request, "extra_key", None) or "").startswith(NAMESPACE_PREFIX):
        raise LayoutError(f"extra_key cannot begin with {NAMESPACE_PREFIX!r}")
    params = request.sampling_params.custom_params
    if params is not None and not isinstance(params, dict):
        raise LayoutError("expected custom_params to be an object")
    if not has_layout(request):
        return
    if not joins:
        raise LayoutError("this server does not join in its KV cache")
    if asked.input_ids is None or asked.text is not None:
        raise LayoutError("a layout counts token ids: expected input_ids instead of text")
    if asked.contains_mm_input():
        raise LayoutError("a joined prompt cannot have images, video or audio")
    layout_of_request(request, len(request.input_ids))
