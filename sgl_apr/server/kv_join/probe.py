"""Prompts, joined ones too, to a running server, and the log-probabilities of its replies; it judges nothing."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sgl_apr.engine.sglang_request import with_layout
from sgl_apr.errors import EngineError
from sgl_apr.trajectory.join_layout import Layout, commit_prompts

GenerateClient = Callable[
    [Mapping[str, Any]], Any
]  # one `/generate` request as SGLang defines it, and its JSON answer
LogprobRow = Mapping[int, float]  # log-probabilities of a step's likeliest tokens, by token id

TIMEOUT = 600.0  # seconds for one answer


@dataclass(frozen=True, slots=True)
class ProbePrompt:
    """Token ids, flat, and the layout that joins them; without one they stand in a line."""

    ids: tuple[int, ...]
    layout: Layout | None = None


@dataclass(frozen=True, slots=True)
class ProbeReply:
    """Tokens, the likeliest ones at each step, and how many tokens of the prompt were cached.

    `chosen` has, for each step, the log-probabilities of the tokens that were asked for.
    """

    tokens: tuple[int, ...]
    rows: tuple[LogprobRow, ...]
    chosen: tuple[LogprobRow, ...]
    cached: int


def make_client(url: str, api_key: str | None = None) -> GenerateClient:
    """Over HTTP; it raises EngineError for any answer but 200, and where none comes."""
    url, headers = url.rstrip("/"), {"Content-Type": "application/json"}
    if api_key:
        headers["Authorization"] = f"Bearer {api_key}"

    def ask(body: Mapping[str, Any]) -> Any:
        try:
            request = urllib.request.Request(f"{url}/generate", json.dumps(body).encode(), headers)
            with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            answer = " ".join(error.read().decode(errors="replace").split())[:300]
            raise EngineError(f"the server answered {error.code}: {answer}", error.code) from error
        except (OSError, ValueError) as error:
            raise EngineError(f"no answer from {url}: {error}") from error

    return ask


def send_prompts(
    ask: GenerateClient,
    prompts: Sequence[ProbePrompt],
    new: int,
    *,
    top: int = 10,
    tokens: Sequence[Sequence[int]] | None = None,
    sampling: Mapping[str, Any] | None = None,
) -> list[ProbeReply]:
    """Replies of `new` tokens, greedy unless `sampling` says otherwise, to all prompts at once.

    Each step has its `top` likeliest tokens, and those of `tokens` (one sequence of ids for each prompt).
    Raises EngineError if a prompt is refused, with status 409 if its branches are not cached.
    """
    common = {"temperature": 0, "ignore_eos": True, **(sampling or {}), "max_new_tokens": new}
    body: dict[str, Any] = {
        "input_ids": [list(p.ids) for p in prompts],
        "sampling_params": [with_layout(common, p.layout) for p in prompts],
    }
    if new:
        body |= {"return_logprob": True, "top_logprobs_num": top}
        if tokens is not None:
            body["token_ids_logprob"] = [list(t) for t in tokens]
    answers = ask(body)
    try:
        return [_reply(answer, new) for answer in answers]
    except (KeyError, TypeError, ValueError) as error:
        raise EngineError(f"the server does not answer like SGLang: {error!r}") from error


def _reply(answer: Any, new: int) -> ProbeReply:
    meta = answer["meta_info"]
    reason = meta["finish_reason"]
    if reason["type"] == "abort":
        raise EngineError(f"the server refused: {reason.get('message')}", reason.get("status_code"))
    if not new:
        return ProbeReply((), (), (), int(meta["cached_tokens"]))
    top, chosen = meta["output_top_logprobs"], meta.get("output_token_ids_logprobs") or ()
    if not top or len(top) != len(answer["output_ids"]):
        raise ValueError("log-probabilities of every token were asked for")
    return ProbeReply(tuple(answer["output_ids"]), _rows(top), _rows(chosen), int(meta["cached_tokens"]))


def _rows(steps: Any) -> tuple[LogprobRow, ...]:
    return tuple({token: logprob for logprob, token, *_ in step} for step in steps)


def commit_branches(ask: GenerateClient, prompts: Sequence[ProbePrompt]) -> None:
    """Bring the branches of all prompts into the cache, those first that others stand behind."""
    waves: dict[int, dict[str, ProbePrompt]] = {}
    for prompt in prompts:
        for ranges, layout in commit_prompts(prompt.layout or ()):
            one = ProbePrompt(tuple(i for first, last in ranges for i in prompt.ids[first:last]), layout)
            waves.setdefault(_blocks(layout or ()), {})[repr(one)] = one
    for _, wave in sorted(waves.items()):
        send_prompts(ask, list(wave.values()), 0)


def _blocks(layout: Layout) -> int:
    return sum(1 + sum(map(_blocks, item)) for item in layout if not isinstance(item, int))
