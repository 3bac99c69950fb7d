"""Ends weak branches while they are written, so that the strong ones get their tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Any

from sgl_apr.runtime.branch_scoring import BranchScoring
from sgl_apr.runtime.running_completion import RunningCompletion
from sgl_apr.runtime.sequence import SequenceState

LIMIT = "value"  # what ends a weak branch, in `Trajectory.limits`


@dataclass(eq=False)
class BranchJudge:
    """Scores branches that run at the borders of their thoughts, and ends the weak ones.

    Attributes:
        tasks: Runs the scorer.
        scoring: The scorer, and what it ends.
        problem: What the scorer is told that the branches work on.
        expected: How many branches there are. No tournament is held before all have begun.
        running: What the branches that run have written.
    """

    tasks: asyncio.TaskGroup
    scoring: BranchScoring
    problem: Any
    expected: int
    running: dict[SequenceState, RunningCompletion] = field(default_factory=dict)
    borders: dict[SequenceState, int] = field(default_factory=dict)
    levels: dict[int, dict[SequenceState, float | None]] = field(default_factory=dict)
    asking: set[asyncio.Task[None]] = field(default_factory=set)
    seen: set[SequenceState] = field(default_factory=set)
    is_answered: bool = False  # a branch is complete, so that all others may end

    def watch(self, running: RunningCompletion) -> None:
        """Ask for the score of a branch that has reached a border."""
        sequence, reached = running.sequence, running.text.count(self.scoring.border)
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
        """Score a branch at a border, and end those that are too weak there."""
        score = await self.scoring.score(self.problem, text, top_logprobs)
        self.levels.setdefault(level, {})[running.sequence] = score
        if self.scoring.threshold is None:
            self.hold_tournaments()
        elif score is not None and score < self.scoring.threshold:
            self.cut(running.sequence)

    def note_ended(self, sequence: SequenceState, *, complete: bool) -> None:
        """A branch has ended, so the others need not wait for it.

        Args:
            sequence: The branch.
            complete: Whether it ended by itself.
        """
        self.is_answered |= complete
        self.seen.add(sequence)
        self.running.pop(sequence, None)
        self.hold_tournaments()

    def hold_tournaments(self) -> None:
        """End the worse branches at each border that all running ones have reached."""
        if self.scoring.threshold is not None or len(self.seen) < self.expected:
            return
        for level in sorted(self.levels):
            scored = self.levels[level]
            live = [sequence for sequence in self.running if not sequence.scope.cancel_reason]
            if any(sequence not in scored for sequence in live):
                return
            known = {s: value for s in live if (value := scored[s]) is not None}
            ranked = sorted(known, key=known.__getitem__, reverse=True)
            for sequence in ranked[max(1, ceil(self.scoring.keep * len(ranked))) :]:
                self.cut(sequence)
            del self.levels[level]

    def cut(self, sequence: SequenceState) -> None:
        """End a weak branch, unless it is the last one that runs."""
        if sequence in self.running and (len(self.running) > 1 or self.is_answered):
            self.running.pop(sequence).cut(LIMIT)

    def stop(self) -> None:
        """Wait for no more scores."""
        for task in self.asking:
            task.cancel()
