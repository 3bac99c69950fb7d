"""Sends prompts, also joined ones, to a running server and returns the log-probabilities of its replies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sgl_apr.engine.http_client import post_json
from sgl_apr.engine.sglang_request import with_layout
from sgl_apr.errors import EngineError
from sgl_apr.trajectory.join_layout import Layout, commit_prompts

GenerateClient = Callable[
    [Mapping[str, Any]], Any
]  # sends one `/generate` request of SGLang, returns its JSON
LogprobRow = Mapping[int, float]  # log-probabilities of the likeliest tokens of one step, by token id

ANSWER_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class ProbePrompt:
    """A prompt.

    Attributes:
        ids: Its token ids, flat.
        layout: The layout that joins them. None means that the prompt is one sequence.
    """

    ids: tuple[int, ...]
    layout: Layout | None = None


@dataclass(frozen=True, slots=True)
class ProbeReply:
    """The reply to a prompt.

    Attributes:
        tokens: The decoded tokens.
        rows: The likeliest tokens of each step.
        chosen: The requested tokens of each step.
        cached: How many tokens of the prompt were cached.
    """

    tokens: tuple[int, ...]
    rows: tuple[LogprobRow, ...]
    chosen: tuple[LogprobRow, ...]
    cached: int


def make_client(url: str, api_key: str | None = None, rank: int = 0) -> GenerateClient:
    """Return a client that sends requests to a server over HTTP.

    The client raises `EngineError` if the server does not answer, or not with status 200.

    Args:
        url: Where the server listens.
        api_key: Its key.
        rank: The data-parallel rank that gets all requests. A server without ranks ignores it if it is 0.
    """
    generate_url = f"{url.rstrip('/')}/generate"

    def generate(body: Mapping[str, Any]) -> Any:
        return post_json(
            generate_url, {**body, "routed_dp_rank": rank}, api_key=api_key, timeout=ANSWER_TIMEOUT_S
        )

    return generate


def send_prompts(
    client: GenerateClient,
    prompts: Sequence[ProbePrompt],
    new_tokens: int,
    *,
    top: int = 10,
    tokens: Sequence[Sequence[int]] | None = None,
    sampling: Mapping[str, Any] | None = None,
) -> list[ProbeReply]:
    """Send all prompts at once and return their replies.

    Args:
        client: Sends the request.
        prompts: The prompts.
        new_tokens: Tokens to decode for each prompt. 0 only prefills.
        top: How many of the likeliest tokens to return for each step.
        tokens: For each prompt, the token ids whose log-probabilities to return for each step.
        sampling: Sampling parameters. By default decoding is greedy.

    Raises:
        EngineError: A prompt was rejected. Its status is `CACHE_MISS_STATUS` if its branches are not cached.
    """
    common = {"temperature": 0, "ignore_eos": True, **(sampling or {}), "max_new_tokens": new_tokens}
    body: dict[str, Any] = {
        "input_ids": [list(p.ids) for p in prompts],
        "sampling_params": [with_layout(common, p.layout) for p in prompts],
    }
    if new_tokens:
        body |= {"return_logprob": True, "top_logprobs_num": top}
        if tokens is not None:
            body["token_ids_logprob"] = [list(t) for t in tokens]
    answers = client(body)
    try:
        return [_parse_reply(answer, new_tokens) for answer in answers]
    except (KeyError, TypeError, ValueError) as error:
        raise EngineError(f"the server does not answer like SGLang: {error!r}") from error


def _parse_reply(answer: Any, new_tokens: int) -> ProbeReply:
    meta = answer["meta_info"]
    reason = meta["finish_reason"]
    if reason["type"] == "abort":
        raise EngineError(f"the server rejected a prompt: {reason.get('message')}", reason.get("status_code"))
    if not new_tokens:
        return ProbeReply((), (), (), int(meta["cached_tokens"]))
    top, chosen = meta["output_top_logprobs"], meta.get("output_token_ids_logprobs") or ()
    if not top or len(top) != len(answer["output_ids"]):
        raise ValueError("the log-probabilities of some tokens are missing")
    return ProbeReply(tuple(answer["output_ids"]), _rows(top), _rows(chosen), int(meta["cached_tokens"]))


def _rows(steps: Any) -> tuple[LogprobRow, ...]:
    return tuple({token: logprob for logprob, token, *_ in step} for step in steps)


def commit_branches(client: GenerateClient, prompts: Sequence[ProbePrompt]) -> None:
    """Prefill the branches of all prompts into the cache, in the order in which they depend on one another.

    Args:
        client: Sends the requests.
        prompts: Prompts with a layout.

    Raises:
        EngineError: A branch was rejected.
    """
    waves: dict[int, dict[str, ProbePrompt]] = {}  # by how many blocks a prompt contains
    for prompt in prompts:
        for ranges, layout in commit_prompts(prompt.layout or ()):
            ids = tuple(i for first, last in ranges for i in prompt.ids[first:last])
            branch = ProbePrompt(ids, layout)
            waves.setdefault(_count_blocks(layout or ()), {})[repr(branch)] = branch
    for _, wave in sorted(waves.items()):
        send_prompts(client, list(wave.values()), 0)


def _count_blocks(layout: Layout) -> int:
    return sum(1 + sum(map(_count_blocks, item)) for item in layout if not isinstance(item, int))
