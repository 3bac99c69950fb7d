"""Samples whose weak ones end early: a scorer judges them while they are written, and the strong ones get their tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from inspect import isawaitable
from math import ceil, isfinite
from typing import Any, Literal

from sgl_apr.engine.base import Engine
from sgl_apr.errors import AprError
from sgl_apr.methods.confidence import token_confidences, trace_confidence
from sgl_apr.methods.prompt import Completion
from sgl_apr.methods.registry import MethodResult
from sgl_apr.methods.running_completion import RunningCompletion
from sgl_apr.methods.session import method_session
from sgl_apr.methods.task import SampledTask, Task, require_family
from sgl_apr.runtime.branch_group import first_error
from sgl_apr.runtime.sequence import SequenceState

Scorer = Callable[[Any, str], float | Awaitable[float]]
TOP_LOGPROBS = 20
LIMIT = "value"  # what ends a weak reply, in `Trajectory.limits`


async def value_guided(
    engine: Engine,
    problem: Any,
    *,
    task: Task[Any],
    n: int = 8,
    scorer: Scorer | Literal["confidence"] = "confidence",
    border: str = "\n",
    keep: float = 0.5,
    threshold: float | None = None,
    timeout: float = 10.0,
    temperature: float = 0.7,
    **options: Any,
) -> MethodResult:
    """Sample `n` replies, and let a scorer end the weak ones at the borders of their thoughts (after Gambit, arXiv 2608.08020,
    whose own engine this does not need).

    At each border a tournament is held: as soon as all replies that still run have reached the border, the worse ones end. What they have
    not written of their tokens is for the others. The answer is that of the complete reply with the best score. A
    score that fails, is late, or is no number ends nothing.

    Args:
        engine: The engine that decodes.
        problem: A problem of the task.
        task: A `SampledTask`.
        n: Number of replies; fewer if the budget cannot pay for them.
        scorer: A function of the problem and what a reply has so far, such as `RewardModel`: higher is better. "confidence" takes
            how sure the model is of its tokens (`trace_confidence`), and asks nobody.
        border: The text that ends a thought.
        keep: Share of the running replies that stay at each border.
        threshold: End replies below this score instead, without a tournament.
        timeout: Seconds that a score may take.
        temperature: Sampling temperature.
        options: Those of `MethodSession`.

    Raises:
        Inapplicable: If the task is no `SampledTask`.
    """
    if n < 1:
        raise AprError(f"n={n}, expected at least 1")
    if not 0 < keep <= 1:
        raise AprError(f"keep={keep}, expected a share above 0, and 1 at most")
    if not border:
        raise AprError("border is empty, expected the text that ends a thought")
    if scorer != "confidence" and not callable(scorer):
        raise AprError(f'scorer={scorer!r}, expected a function of the problem and a text, or "confidence"')
    if not timeout > 0:
        raise AprError(f"timeout={timeout}, expected more than 0 seconds")
    prompt = require_family(task, SampledTask).prompt(problem)
    options = {**options, "temperature": temperature}
    if scorer == "confidence":
        options = {"logprobs": True, "top_logprobs": TOP_LOGPROBS, **options}
    async with method_session(engine, prompt, "value_guided", **options) as session:
        width = session.affordable_width(n, task.max_tokens)
        scores = _Scores(problem, scorer, timeout)
        try:
            async with asyncio.TaskGroup() as tasks:
                judge = _Judge(tasks, scores, border, keep, threshold, expected=width)
                watched = replace(prompt.without_text, watch=judge.watch)
                replies = await session.fork(session.root, [watched] * width, is_enough=judge.note_ended)
                judge.stop()
        except BaseExceptionGroup as failed:
            error = first_error(failed)
            raise error from error.__cause__
        complete = [c for c in replies if c.finish not in ("aborted", "failed") and task.answer(c.text)]
        final = await asyncio.gather(*(scores.of(c.text, c.top_logprobs) for c in complete))
        best = max(zip(complete, final, strict=True), key=_by_score, default=None)
        answer, score = (task.answer(best[0].text), best[1]) if best else ("", None)
        return MethodResult("value_guided", answer, session.finish(), score, "gambit-style")


def _by_score(scored: tuple[Completion, float | None]) -> float:
    return float("-inf") if scored[1] is None else scored[1]


@dataclass(frozen=True)
class _Scores:
    """Asks a scorer, which may be hostile."""

    problem: Any
    scorer: Scorer | Literal["confidence"]
    timeout: float

    async def of(self, text: str, top_logprobs: Sequence[Any]) -> float | None:
        """The score of a text; None if it failed, is late, or is no number."""
        if self.scorer == "confidence":
            return trace_confidence(token_confidences(top_logprobs), "mean")
        assert callable(self.scorer)
        try:
            async with asyncio.timeout(self.timeout):
                found = await asyncio.to_thread(self.scorer, self.problem, text)
                value = float(await found if isawaitable(found) else found)
        except Exception:  # a scorer that fails costs no answer
            return None
        return value if isfinite(value) else None


@dataclass(eq=False)
class _Judge:
    """Judges running replies at the borders of their thoughts."""

    tasks: asyncio.TaskGroup
    scores: _Scores
    border: str
    keep: float
    threshold: float | None
    expected: int
    running: dict[SequenceState, RunningCompletion] = field(default_factory=dict)
    borders: dict[SequenceState, int] = field(default_factory=dict)
    levels: dict[int, dict[SequenceState, float | None]] = field(default_factory=dict)
    asking: set[asyncio.Task[None]] = field(default_factory=set)
    seen: set[SequenceState] = field(default_factory=set)
    is_answered: bool = False  # a reply is complete, so that all others may end

    def watch(self, running: RunningCompletion) -> None:
        """Ask for the score of a reply that has reached a border."""
        sequence, reached = running.sequence, running.text.count(self.border)
        self.running[sequence] = running
        self.seen.add(sequence)
        if reached <= self.borders.get(sequence, 0):
            return
        self.borders[sequence] = reached
        task = self.tasks.create_task(self.judge(running, reached, running.text, tuple(running.top_logprobs)))
        self.asking.add(task)
        task.add_done_callback(self.asking.discard)

    async def judge(
        self, running: RunningCompletion, level: int, text: str, top_logprobs: Sequence[Any]
    ) -> None:
        """Score a reply at a border, and end those that are too weak there."""
        score = await self.scores.of(text, top_logprobs)
        self.levels.setdefault(level, {})[running.sequence] = score
        if self.threshold is None:
            self.hold_tournaments()
        elif score is not None and score < self.threshold:
            self.cut(running.sequence)

    def note_ended(self, completions: Sequence[Completion]) -> bool:
        """A reply has ended, for which the others need not wait. It never ends them all."""
        self.is_answered = any(completion.is_complete for completion in completions)
        for completion in completions:
            self.seen.add(completion.sequence)
            self.running.pop(completion.sequence, None)
        self.hold_tournaments()
        return False

    def hold_tournaments(self) -> None:
        """End the worse replies at each border that all running ones have reached."""
        if self.threshold is not None or len(self.seen) < self.expected:
            return
        for level in sorted(self.levels):
            scored = self.levels[level]
            live = [sequence for sequence in self.running if not sequence.scope.cancel_reason]
            if any(sequence not in scored for sequence in live):
                return
            known = {s: value for s in live if (value := scored[s]) is not None}
            ranked = sorted(known, key=known.__getitem__, reverse=True)
            for sequence in ranked[max(1, ceil(self.keep * len(ranked))) :]:
                self.cut(sequence)
            del self.levels[level]

    def cut(self, sequence: SequenceState) -> None:
        """End a weak reply, unless it is the last one that runs."""
        if sequence in self.running and (len(self.running) > 1 or self.is_answered):
            self.running.pop(sequence).cut(LIMIT)

    def stop(self) -> None:
        """Wait for no more scores."""
        for task in self.asking:
            task.cancel()
