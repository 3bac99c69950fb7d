"""CPU and wall time of the fork-join loop per engine call, on an engine that answers at once."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import sgl_apr as apr
from sgl_apr.engine.base import GroupRequest, Load, Request, Result, TokenSink
from sgl_apr.formats.masks.writer import GrammarBackend
from sgl_apr.tokenizer import Tokenizer
from sgl_apr.trajectory.worker_groups import GroupKind

DIALECT = apr.dialect("threadweaver")
FORK: dict[str, Any] = {"mode": "parallel", "temperature": 1.0}
FORCED = FORK | {"budget": apr.Budget(tokens=1600), "max_blocks": 1}
CHUNK_COMPLETE, CHUNK_NONE, CHUNK_TOKEN = 1 << 30, 0, 1  # ids per streamed chunk
CHUNKS = {"": CHUNK_COMPLETE, "_not_streamed": CHUNK_NONE, "_token_by_token": CHUNK_TOKEN}
REPETITIONS = 10
WARM_UP = 20  # trajectories


def script(tokenizer: Tokenizer, width: int, tokens: int) -> Iterator[tuple[int, ...]]:
    """The output of each request: a fork, branches of `tokens` tokens each, and a conclusion with an answer."""
    rng, encode = random.Random(width), tokenizer.encode

    def words(count: int) -> str:
        return " ".join(rng.choices(["the", "first", "part", "is", "then", "what", "we", "know"], k=count))

    outlines = "".join(f"<Outline>{k + 1}: {words(2)}</Outline>\n" for k in range(width))
    yield tuple(encode(f"{words(8)}<Parallel>\n<Outlines>\n{outlines}</Outlines>"))
    for _ in range(width):
        yield (*encode(words(tokens))[: tokens - 1], *encode("</Thread>"))
    yield (*encode(f"<Conclusion>{words(6)}</Conclusion>\n</Parallel>{words(8)}"), min(tokenizer.eos_ids))


class ReplayEngine:
    """An engine without latency. It answers new prompts in the order of a script, and known prompts as before.

    Attributes:
        chunk: Ids per streamed chunk.
        calls: Number of calls.
        seconds: Wall time in this engine.
        cpu_seconds: CPU time in it.
        answers: Answers by prompt.
        requests: Requests with new prompts.
        prefix: The prompt of the last fork.
        text: The text of the last trajectory.
    """

    grammar_backend: GrammarBackend = "llguidance"
    supports_seeds, context, joins_kv, chunk = False, None, False, CHUNK_COMPLETE
    resumes_grammar = caches_output = False
    groups: tuple[GroupKind, ...] = ()

    def __init__(self, tokenizer: Tokenizer, answers: Iterator[tuple[int, ...]]) -> None:
        self.tokenizer, self._script, self.calls = tokenizer, answers, 0
        self.seconds = self.cpu_seconds = 0.0
        self.answers: dict[tuple[int, ...], tuple[int, ...]] = {}
        self.requests: list[Request] = []
        self.prefix: Sequence[int] = ()
        self.text = ""

    async def decode(self, request: Request, on_tokens: TokenSink | None = None) -> Result:
        started, cpu = time.perf_counter(), time.thread_time()
        if (ids := self.answers.get(request.input_ids)) is None:
            ids = self.answers[request.input_ids] = next(self._script)
            self.requests.append(request)
        result = Result(ids, "stop", len(request.input_ids), 0)
        self.calls += 1
        self.cpu_seconds += time.thread_time() - cpu
        self.seconds += time.perf_counter() - started  # the time of `on_tokens` is the loop's
        if on_tokens and self.chunk:
            for k in range(0, len(ids), self.chunk):
                on_tokens(ids[k : k + self.chunk])
        return result

    async def group(self, group: GroupRequest, *sinks: object) -> list[Result | apr.EngineError]:
        raise apr.UnsupportedEngine("a replay has no groups")

    async def commit(self, request: Request) -> Result:
        self.calls += 1
        return Result((), "length", len(request.input_ids), 0)

    async def fork(self, request: Request, size: int) -> tuple[Result, list[ReplayEngine]]:
        self.prefix = request.input_ids
        return await self.commit(request), [self] * size

    async def release(self) -> None: ...

    async def abort(self, rid: str) -> None: ...

    async def load(self) -> Load:
        return Load(running=0, waiting=0, used_tokens=0, max_tokens=1 << 30)


async def loop_times(runs: int, progress: Iterable[int] = range(REPETITIONS)) -> dict[str, float]:
    """Microseconds of the loop per engine call, for a fork into 4 that is answered immediately.

    The ways in which answers are streamed take turns. Each figure is the median over the repetitions of the median over
    their trajectories.

    Args:
        runs: Trajectories for each way, in all.
        progress: The repetitions.

    Returns:
        `loop_cpu_us`, CPU time of this thread, and `loop_overhead_us`, wall time, for answers that come in one chunk;
        the same with a suffix for answers that are not streamed, and for those that come token by token.
    """
    medians: dict[str, list[float]] = {}
    arms = {name: _arm(chunk) for name, chunk in CHUNKS.items()}
    for repetition in progress:
        for name, (engine, options) in arms.items():
            # Those of the first repetition lower the grammars.
            samples = [await _times(engine, options) for _ in range(runs // REPETITIONS + WARM_UP)]
            wall, cpu = zip(*samples[0 if repetition else WARM_UP :], strict=True)
            assert DIALECT.is_valid(engine.text)
            medians.setdefault(f"loop_overhead_us{name}", []).append(statistics.median(wall))
            medians.setdefault(f"loop_cpu_us{name}", []).append(statistics.median(cpu))
    return {name: round(statistics.median(values), 1) for name, values in medians.items()}


def _arm(chunk: int) -> tuple[ReplayEngine, dict[str, Any]]:
    """An engine that streams chunks of this size, and the options of its trajectories."""
    tokenizer = apr.ByteTokenizer(DIALECT.tags)
    engine = ReplayEngine(tokenizer, script(tokenizer, 4, 32))
    engine.chunk = chunk
    # Under a deadline the loop receives every token as it comes. Else it waits for the end of a request.
    options = FORCED | {"budget": apr.Budget(tokens=1600, seconds=3600)} if chunk == CHUNK_TOKEN else FORCED
    return engine, options


async def _times(engine: ReplayEngine, options: dict[str, Any]) -> tuple[float, float]:
    """Wall and CPU time of one trajectory, without those of the engine, in microseconds per call."""
    engine.calls, engine.seconds, engine.cpu_seconds = 0, 0.0, 0.0
    started, cpu = time.perf_counter(), time.thread_time()
    trajectory = await apr.areason(engine, "Question: ", DIALECT, **options)
    cpu, seconds = time.thread_time() - cpu, time.perf_counter() - started
    assert engine.calls == 7, "trunk, commit, 4 branches, conclusion"
    engine.text = trajectory.text
    return (seconds - engine.seconds) / engine.calls * 1e6, (cpu - engine.cpu_seconds) / engine.calls * 1e6
