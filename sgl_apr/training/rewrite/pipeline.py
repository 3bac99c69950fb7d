"""Rewrite many sequential traces into trajectories with forks, by any OpenAI-compatible endpoint."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from sgl_apr.errors import AprError, EngineError
from sgl_apr.formats.dialects import Dialect
from sgl_apr.tokenizer import Tokenizer
from sgl_apr.training.rewrite.rewriter import JsonModel, RejectedTrace, parallelize
from sgl_apr.trajectory.jsonl import append_line, open_for_append, read_lines
from sgl_apr.trajectory.trace_files import TextRecord
from sgl_apr.trajectory.trajectory import Trajectory

LINE_FORMAT = '{"id": ..., "trajectory" or "rejected": ...}'


class ChatJsonModel:
    """A chat endpoint that is asked for JSON with `response_format`.

    Args:
        base_url: URL of the endpoint.
        model: Name of the model there.
        api_key: Key of the endpoint.
        max_tokens: Tokens of an answer.
        **options: Further options of a chat completion.
    """

    def __init__(
        self,
        base_url: str,
        model: str = "default",
        *,
        api_key: str = "none",
        max_tokens: int = 2048,
        **options: Any,
    ) -> None:
        from openai import AsyncOpenAI

        self.client = AsyncOpenAI(base_url=base_url, api_key=api_key)
        self.model, self.options = model, {"max_tokens": max_tokens, **options}

    async def __call__(self, prompt: str, schema: Mapping[str, Any]) -> str:
        from openai import OpenAIError

        response_format: Any = {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": dict(schema)},
        }
        messages: Any = [{"role": "user", "content": prompt}]
        try:
            answer = await self.client.chat.completions.create(
                model=self.model, messages=messages, response_format=response_format, **self.options
            )
        except OpenAIError as error:
            raise EngineError(f"{self.client.base_url} did not answer: {error}") from error
        return answer.choices[0].message.content or ""


@dataclass(frozen=True)
class RewriteStatistics:
    """What became of the traces.

    Attributes:
        accepted: Number of trajectories.
        rejected: Number of other traces by reason.
        blocks: Mean blocks per trajectory.
        width: Mean branches per block.
        tokens: Mean tokens per trajectory.
        parallelism: Mean of total tokens over the critical path.
    """

    accepted: int
    rejected: Mapping[str, int] = field(default_factory=dict)
    blocks: float = 0.0
    width: float = 0.0
    tokens: float | None = None
    parallelism: float | None = None


async def rewrite_traces(
    traces: Iterable[TextRecord],
    model: JsonModel,
    dialect: Dialect,
    out: Path,
    *,
    tokenizer: Tokenizer | None = None,
    width: int = 8,
    at_once: int = 16,
    on_done: Callable[[], None] | None = None,
) -> RewriteStatistics:
    """Rewrite traces, and write one line for each: `{"id": ..., "trajectory": ...}` or `{"id": ..., "rejected": ...}`.

    A trace is identified by its origin (`TextRecord.source`). Traces that are in `out` already are skipped. A trace for which
    the endpoint failed gets no line, so that another run tries it again.

    Args:
        traces: The traces.
        model: Answers questions about them.
        dialect: Dialect of the trajectories.
        out: File to append to.
        tokenizer: Adds token ids to the trajectories.
        width: Branches of a fork at most.
        at_once: Traces under way at the same time.
        on_done: Called after each trace.

    Returns:
        Statistics of the complete file.

    Raises:
        EngineError: The first failure of the endpoint, once all other traces are done.
    """
    failed: list[EngineError] = []
    with open_for_append(out) as file:
        done = {name for name, _ in _lines(out)}
        todo = (trace for trace in traces if trace.source not in done)

        async def work() -> None:
            for trace in todo:
                try:
                    trajectory = await parallelize(trace.text, model, dialect, tokenizer, width=width)
                    ids = (
                        tuple(tokenizer.encode(trace.prompt, add_special_tokens=True)) if tokenizer else None
                    )
                    outcome = f'"trajectory": {trajectory.with_prompt(trace.prompt, ids).to_json()}'
                except RejectedTrace as error:
                    outcome = f'"rejected": {json.dumps(error.reason)}'
                except EngineError as error:
                    failed.append(error)
                    continue
                append_line(file, f'{{"id": {json.dumps(trace.source)}, {outcome}}}')
                if on_done:
                    on_done()

        async with asyncio.TaskGroup() as workers:
            for _ in range(at_once):
                workers.create_task(work())
    if failed:
        raise failed[0]
    return rewrite_statistics(out)


def read_trajectories(path: Path) -> Iterator[Trajectory]:
    """The trajectories of a file that `rewrite_traces` wrote."""
    for _, data in _lines(path):
        if "trajectory" in data:
            yield Trajectory.from_dict(data["trajectory"])


def rewrite_statistics(path: Path) -> RewriteStatistics:
    """Statistics of a file that `rewrite_traces` wrote."""
    rejected = Counter(str(data["rejected"]) for _, data in _lines(path) if "rejected" in data)
    trajectories = list(read_trajectories(path))
    blocks = [block for t in trajectories for block in t.blocks]
    counted = [t.metrics() for t in trajectories if all(s.token_ids is not None for s in t.spans)]
    return RewriteStatistics(
        accepted=len(trajectories),
        rejected=dict(rejected.most_common()),
        blocks=fmean(len(t.blocks) for t in trajectories) if trajectories else 0.0,
        width=fmean(len(b.branches) for b in blocks) if blocks else 0.0,
        tokens=fmean(m.total for m in counted) if counted else None,
        parallelism=fmean(m.parallelism for m in counted) if counted else None,
    )


def _lines(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, line in read_lines(path, expected=LINE_FORMAT):
        if "id" not in line:
            raise AprError(f"{path}, line {number}: expected {LINE_FORMAT}, found the keys {', '.join(line)}")
        yield str(line["id"]), line
