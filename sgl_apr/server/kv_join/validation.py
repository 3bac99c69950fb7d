"""Validates requests with a layout.

The HTTP process validates a request before it forwards it, and the scheduler validates it again. An exception in the
scheduler ends the server for all clients, so no request may get there that was not validated.
"""

from __future__ import annotations

from typing import Any

from sgl_apr.server.kv_join.cache_keys import NAMESPACE_PREFIX, lookup_cost
from sgl_apr.trajectory.join_layout import LAYOUT_PARAM, Layout, LayoutError, parse_layout

MAX_LAYOUT_CHARS = 1 << 16  # characters of the JSON
MAX_LOOKUP_COST = (
    1 << 23
)  # tokens that are compared to find all segments of a prompt; they take a tenth of a second

# With these, keys and values depend on more than the ids and the layout, or a prompt is more than its ids. The keys
# are field names of the HTTP process and of the scheduler.
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
    """Return whether a tokenized request, or a request of the scheduler, has a layout."""
    params = request.sampling_params.custom_params
    return isinstance(params, dict) and LAYOUT_PARAM in params


def layout_of_request(request: Any, tokens: int, page_size: int = 1) -> Layout:
    """Parse and validate the layout of a request.

    Args:
        request: A tokenized request, or a request of the scheduler, that has a layout.
        tokens: Tokens of its prompt.
        page_size: Tokens of a page of the cache.

    Raises:
        LayoutError: The layout does not fit the prompt, is too large, or does not go with the other fields.
    """
    for name, what in UNSUPPORTED_FIELDS.items():
        if getattr(request, name, None) is not None:
            raise LayoutError(f"a joined prompt cannot have {what}")
    if (request.sampling_params.beam_width or 1) > 1:
        raise LayoutError("a joined prompt cannot be decoded with beam search")
    if request.return_logprob and 0 <= request.logprob_start_len < tokens:
        raise LayoutError("a joined prompt has no log-probabilities, because it is not computed again")
    text = request.sampling_params.custom_params[LAYOUT_PARAM]
    if not isinstance(text, str) or len(text) > MAX_LAYOUT_CHARS:
        raise LayoutError(f"expected the layout as JSON in a string of at most {MAX_LAYOUT_CHARS} characters")
    layout = parse_layout(text, tokens)
    if (cost := lookup_cost(layout, page_size)) > MAX_LOOKUP_COST:
        raise LayoutError(
            f"the branches and the tokens before each of them are {cost} tokens, expected at most {MAX_LOOKUP_COST}"
        )
    return layout


def validate_request(client_request: Any, request: Any, joins: bool, ranks: int = 1) -> None:
    """Reject in the HTTP process what the scheduler must not receive.

    Args:
        client_request: The request as a client sent it.
        request: The same request, tokenized.
        joins: Whether the server has the cache that joins.
        ranks: Data-parallel ranks of the server. Each has a cache of its own.

    Raises:
        LayoutError: The request is not valid.
    """
    if (getattr(request, "extra_key", None) or "").startswith(NAMESPACE_PREFIX):
        raise LayoutError(f"extra_key cannot begin with {NAMESPACE_PREFIX!r}")
    params = request.sampling_params.custom_params
    if params is not None and not isinstance(params, dict):
        raise LayoutError(f"custom_params is {type(params).__name__}, expected an object")
    if not has_layout(request):
        return
    if not joins:
        raise LayoutError("this server does not join in its KV cache")
    if ranks > 1 and request.routed_dp_rank is None:
        raise LayoutError(
            f"this server has {ranks} data-parallel ranks, and only one has the branches in its cache: expected its "
            "number as routed_dp_rank, here and in the requests that commit the branches"
        )
    if client_request.input_ids is None or client_request.text is not None:
        raise LayoutError("a layout counts token ids: expected input_ids instead of text")
    if client_request.contains_mm_input():
        raise LayoutError("a joined prompt cannot have images, video or audio")
    layout_of_request(request, len(request.input_ids))
