"""Many traces to trajectories with forks, by any OpenAI-compatible endpoint; each is written as it is done, or why not."""

from __future__ import annotations

import asyncio
import json
import os
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
from sgl_apr.trajectory.jsonl import open_for_append
from sgl_apr.trajectory.trace_files import TextRecord
from sgl_apr.trajectory.trajectory import Trajectory


class ChatJsonModel:
    """Asks a chat endpoint with `response_format`, so that a server that constrains decoding answers by the schema."""

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

        shape: Any = {"type": "json_schema", "json_schema": {"name": "answer", "schema": dict(schema)}}
        messages: Any = [{"role": "user", "content": prompt}]
        try:
            answer = await self.client.chat.completions.create(
                model=self.model, messages=messages, response_format=shape, **self.options
            )
        except OpenAIError as error:
            raise EngineError(f"{self.client.base_url} did not answer: {error}") from error
        return answer.choices[0].message.content or ""


@dataclass(frozen=True)
class RewriteStatistics:
    """What became of the traces: how many make trajectories, and of the others how many for which reason.

    Means over the trajectories: blocks, branches of a block, tokens, and total tokens over the critical path.
    """

    kept: int
    rejected: Mapping[str, int] = field(default_factory=dict)
    blocks: float = 0.0
    width: float = 0.0
    tokens: float | None = None
    parallelism: float | None = None


async def rewrite_traces(
    traces: Iterable[TextRecord],
    ask: JsonModel,
    to: Dialect,
    out: Path,
    *,
    tokenizer: Tokenizer | None = None,
    width: int = 8,
    at_once: int = 16,
    on_done: Callable[[], None] | None = None,
) -> RewriteStatistics:
    """Rewrite traces into `to`, a line of `out` for each: `{"id": ..., "trajectory": ...}` or `{"id": ..., "rejected": ...}`.

    A trace is known by where it comes from (`Record.source`). One that stands in `out` is not done again; one for
    which the endpoint failed does not, so that another run tries it again, and the first such error is raised
    when the others are done.
    """
    failed: list[EngineError] = []
    with open_for_append(out) as file:
        done = {name for name, _ in _lines(out)}
        todo = (trace for trace in traces if trace.source not in done)

        async def work() -> None:
            for trace in todo:
                try:
                    made = await parallelize(trace.text, ask, to, tokenizer, width=width)
                    ids = (
                        tuple(tokenizer.encode(trace.prompt, add_special_tokens=True)) if tokenizer else None
                    )
                    said = f'"trajectory": {made.with_prompt(trace.prompt, ids).to_json()}'
                except RejectedTrace as error:
                    said = f'"rejected": {json.dumps(error.reason)}'
                except EngineError as error:
                    failed.append(error)
                    continue
                os.write(file, f'{{"id": {json.dumps(trace.source)}, {said}}}\n'.encode())
                if on_done:
                    on_done()

        async with asyncio.TaskGroup() as workers:
            for _ in range(at_once):
                workers.create_task(work())
    if failed:
        raise failed[0]
    return rewrite_statistics(out)


def read_trajectories(path: Path) -> Iterator[Trajectory]:
    """Those of a file that `rewrite` has written."""
    for _, data in _lines(path):
        if "trajectory" in data:
            yield Trajectory.from_json(json.dumps(data["trajectory"]))


def rewrite_statistics(path: Path) -> RewriteStatistics:
    """What a file that `rewrite` has written holds."""
    rejected = Counter(str(data["rejected"]) for _, data in _lines(path) if "rejected" in data)
    made = list(read_trajectories(path))
    blocks = [block for t in made for block in t.blocks]
    counted = [t.metrics() for t in made if all(s.token_ids is not None for s in t.spans)]
    return RewriteStatistics(
        kept=len(made),
        rejected=dict(rejected.most_common()),
        blocks=fmean(len(t.blocks) for t in made) if made else 0.0,
        width=fmean(len(b.branches) for b in blocks) if blocks else 0.0,
        tokens=fmean(m.total for m in counted) if counted else None,
        parallelism=fmean(m.parallelism for m in counted) if counted else None,
    )


def _lines(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                data = json.loads(line)
                yield str(data["id"]), data
            except (ValueError, KeyError, TypeError):
                raise AprError(
                    f'{path}, line {number}: expected {{"id": ..., "trajectory" or "rejected": ...}}'
                ) from None
