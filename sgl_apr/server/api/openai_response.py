"""Builds OpenAI's response objects of a trajectory: completions, and chunks of streamed completions."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from sgl_apr.errors import AprError
from sgl_apr.runtime.events import BranchEnded, Delta, Event, Forked, Joined, TextRetracted
from sgl_apr.runtime.value_checks import check_type, shorten
from sgl_apr.trajectory.blocks import Block
from sgl_apr.trajectory.trajectory import Trajectory


@dataclass(frozen=True, slots=True)
class ResponseOptions:
    """How the response of a trajectory should look.

    Attributes:
        separate_reasoning: Put the answer after the last join into `content` and the trace before it into
            `reasoning_content`. Otherwise `content` is all of it.
        include_trajectory: Add the complete trajectory to the field `apr`.
        trunk_only: Stream only what the trunk writes.
        include_usage: End a stream with a chunk that has the usage.
    """

    separate_reasoning: bool = False
    include_trajectory: bool = False
    trunk_only: bool = False
    include_usage: bool = False

    @classmethod
    def pop_from(cls, options: dict[str, Any]) -> Self:
        """Take the options of the response out of those of a trajectory.

        Raises:
            AprError: One of them has a value that is not possible.
        """
        stream = options.pop("stream", "all")
        if stream not in ("all", "trunk"):
            raise AprError(f'apr stream={shorten(stream)}, expected "all" or "trunk"')
        return cls(
            separate_reasoning=check_type(
                "separate_reasoning", options.pop("separate_reasoning", False), bool
            ),
            include_trajectory=check_type("trajectory", options.pop("trajectory", False), bool),
            trunk_only=stream == "trunk",
        )


@dataclass(frozen=True, slots=True)
class OpenAIResponseBuilder:
    """Build the objects of one response.

    Attributes:
        model: The model's name, as the request has it.
        chat: Whether to build chat completions or text completions.
        options: How the response should look.
        id: The response's id, without its prefix.
        created: Seconds since 1970.
    """

    model: str
    chat: bool
    options: ResponseOptions
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def completion(self, trajectory: Trajectory) -> dict[str, Any]:
        """Return the complete response in one object."""
        text, reasoning = trajectory.text, None
        if self.options.separate_reasoning:
            answer = trajectory.answer
            reasoning = text[: len(text) - len(answer)] if trajectory.blocks else None
            text = answer
        body: dict[str, Any] = {"text": text}
        if self.chat:
            body = {"message": {"role": "assistant", "content": text, "reasoning_content": reasoning}}
        return {
            **self._head("chat.completion"),
            "choices": [_choice(body, finish_reason(trajectory))],
            "usage": usage(trajectory),
            "apr": trajectory_summary(trajectory, include_trajectory=self.options.include_trajectory),
        }

    async def chunks(
        self, events: AsyncGenerator[Event | Trajectory, None]
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Yield the chunks of a streamed response.

        Each chunk with text has the path of its sequence in `apr`. The chunks of the branches of a fork interleave.
        Other events are chunks with empty text. The last chunk has the finish reason and the structure.

        Args:
            events: The events of the trajectory, then the trajectory. It is closed at the end.
        """
        is_first = True
        async with aclosing(events):
            async for event in events:
                if is_first and self.chat:
                    yield self._chunk({"role": "assistant", "content": ""}, {"path": []})
                is_first = False
                if isinstance(event, Trajectory):
                    for chunk in self._last_chunks(event):
                        yield chunk
                elif self.options.trunk_only and not _is_trunk_text(event):
                    continue
                elif isinstance(event, Delta):
                    yield self._chunk(self._text(event.text), {"path": event.path})
                elif (summary := _event_summary(event)) is not None:
                    yield self._chunk(self._text(""), summary)

    def _last_chunks(self, trajectory: Trajectory) -> Iterator[dict[str, Any]]:
        summary = trajectory_summary(trajectory, include_trajectory=self.options.include_trajectory)
        body = {} if self.chat else {"text": ""}
        yield self._chunk(body, {"event": "done", **summary}, finish_reason(trajectory))
        if self.options.include_usage:
            yield {**self._head("chat.completion.chunk"), "choices": [], "usage": usage(trajectory)}

    def _text(self, text: str) -> dict[str, Any]:
        return {"content": text} if self.chat else {"text": text}

    def _chunk(self, body: dict[str, Any], apr: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        body = {"delta": body} if self.chat else body
        return {**self._head("chat.completion.chunk"), "choices": [_choice(body, finish)], "apr": apr}

    def _head(self, chat_object: str) -> dict[str, Any]:
        prefix, object_ = ("chatcmpl", chat_object) if self.chat else ("cmpl", "text_completion")
        return {"id": f"{prefix}-{self.id}", "object": object_, "created": self.created, "model": self.model}


def finish_reason(trajectory: Trajectory) -> str:
    """Return OpenAI's finish reason: "length" if a limit cut the trunk, else "stop"."""
    return "length" if trajectory.finish in ("length", "timeout", "aborted") else "stop"


def usage(trajectory: Trajectory) -> dict[str, Any]:
    """Return OpenAI's usage object, with our own counts in `apr`.

    `completion_tokens` are all tokens after the prompt, including those of branches and injected ones.
    `prompt_tokens_details.cached_tokens` are the tokens of the prompt that were cached before the trajectory.
    `apr.cached` and `apr.reprefilled` are sums over all requests to the engine, so they count a shared prefix once per
    request.
    """
    metrics = trajectory.metrics()
    prompt = sum(s.tokens for s in trajectory.spans if s.origin == "prompt")
    cached = trajectory.calls[0].cached_tokens if trajectory.calls else None
    return {
        "prompt_tokens": prompt,
        "completion_tokens": metrics.total,
        "total_tokens": prompt + metrics.total,
        "prompt_tokens_details": {"cached_tokens": min(cached or 0, prompt)},
        "apr": {
            "total": metrics.total,
            "critical_path": metrics.critical_path,
            "cached": metrics.cached_tokens,
            "reprefilled": metrics.reprefilled_tokens,
            "forks": metrics.blocks,
        },
    }


def trajectory_summary(trajectory: Trajectory, *, include_trajectory: bool = False) -> dict[str, Any]:
    """Return the field `apr` of a response: structure, joins, limits and metrics of the trajectory."""
    metrics = trajectory.metrics()
    summary = {
        "dialect": trajectory.dialect,
        "finish": trajectory.finish,
        "blocks": [_block_summary(trajectory, block) for block in trajectory.blocks],
        "joins": [asdict(join) for join in trajectory.joins],
        "limits": [asdict(limit) for limit in trajectory.limits],
        "metrics": {
            **{name: value for name, value in asdict(metrics).items() if name != "phases"},
            "acceleration": metrics.acceleration,
            "parallelism": metrics.parallelism,
        },
        "seed": trajectory.seed,
        "seeds_honoured": trajectory.seeds_honoured,
        "tokens_shared": trajectory.tokens_shared,
    }
    if include_trajectory:
        summary["trajectory"] = json.loads(trajectory.to_json())
    return summary


def _choice(body: dict[str, Any], finish: str | None) -> dict[str, Any]:
    return {"index": 0, **body, "logprobs": None, "finish_reason": finish}


def _block_summary(trajectory: Trajectory, block: Block) -> dict[str, Any]:
    return {
        "path": block.path,
        "conclusion": block.conclusion,
        "branches": [
            {
                "path": branch.path,
                "outline": branch.outline,
                "text": branch.text,
                "result": branch.result,
                "outcome": branch.outcome,
                "tokens": sum(trajectory.spans[i].tokens for i in branch.spans),
            }
            for branch in block.branches
        ],
    }


def _is_trunk_text(event: Event) -> bool:
    return isinstance(event, Delta | TextRetracted) and event.path == ()


def _event_summary(event: Event) -> dict[str, Any] | None:
    """Return the field `apr` of a chunk without text, or None if the event is not streamed."""
    match event:
        case Forked(path, branches, first):
            numbered = [{"number": number, "outline": outline} for number, outline in branches]
            return {"event": "forked", "path": path, "branches": numbered, "first_branch": first}
        case BranchEnded(path, outcome):
            return {"event": "branch_ended", "path": path, "outcome": outcome}
        case Joined(path, branches):
            return {"event": "joined", "path": path, "branches": branches}
        case TextRetracted(path, chars):
            return {"event": "text_retracted", "path": path, "chars": chars}
    return None
