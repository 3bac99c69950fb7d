"""The held-out curve of a training run: greedy replies to problems that no step draws."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

from sgl_apr.engine.http import HttpEngine
from sgl_apr.training.checkpoint import replace_file, write_errors
from sgl_apr.training.grpo_config import GrpoConfig
from sgl_apr.training.rewards import reward
from sgl_apr.training.rollouts import TrainingProblem, sample_rollouts

HELDOUT_FILE = "heldout.jsonl"


@dataclass(frozen=True, slots=True)
class HeldOutPoint:
    """One evaluation, and one line of `heldout.jsonl`; means over the held-out problems.

    Attributes:
        step: Steps before it.
        reward: Mean reward, as in training step 0.
        accuracy: Share of correct replies.
        false_claims: Share of replies with an answer that is wrong.
        forked: Share of replies with a fork.
        critical_path: Tokens of the critical path.
        total: Decoded tokens.
        accuracy_by_task: Accuracy on the problems of each task.
        seconds: Seconds that it took.
    """

    step: int
    reward: float
    accuracy: float
    false_claims: float
    forked: float
    critical_path: float
    total: float
    accuracy_by_task: dict[str, float]
    seconds: float


class HeldOutCurve:
    """The evaluations of a run, in a file of its directory, from which an interrupted run continues.

    Args:
        out: The directory.
        step: Steps that the run has done. Evaluations after later steps are removed.

    Attributes:
        points: The evaluations so far.
    """

    def __init__(self, out: Path, step: int = 0) -> None:
        self._path = out / HELDOUT_FILE
        lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []
        self.points = [p for line in lines if (p := HeldOutPoint(**json.loads(line))).step <= step]

    def add(self, point: HeldOutPoint) -> None:
        """Append an evaluation.

        Raises:
            AprError: If the file cannot be written.
        """
        self.points.append(point)
        with write_errors(self._path):
            replace_file(self._path, "".join(json.dumps(asdict(p)) + "\n" for p in self.points))

    def is_flat(self, window: int, min_gain: float) -> bool:
        """Whether the mean reward of the last `window` evaluations is less than `min_gain` above that of the `window` before them.

        Means over several evaluations, since the best of several noisy ones rises by chance.
        """
        rewards = [point.reward for point in self.points]
        if not window or len(rewards) < 2 * window:
            return False
        return fmean(rewards[-window:]) - fmean(rewards[-2 * window : -window]) < min_gain


async def evaluate_heldout(
    url: str, problems: Sequence[TrainingProblem], config: GrpoConfig, step: int, timeout: float
) -> HeldOutPoint:
    """Evaluate the weights of a running server.

    Args:
        url: The server.
        problems: The held-out problems.
        config: The configuration of the run.
        step: Steps before.
        timeout: As for `HttpEngine.connect`.
    """
    began, rollouts = time.monotonic(), config.rollouts
    async with await HttpEngine.connect(url, timeout=timeout) as engine:
        replies = await sample_rollouts(engine, problems, config.dialect, rollouts, temperature=0.0)
    score = reward(rollouts.reward, parallel=rollouts.parallel, length=rollouts.length)
    rewards = [score(reply.trajectory, reply.correct) for reply in replies]
    metrics = [reply.trajectory.metrics() for reply in replies]
    by_task: dict[str, list[float]] = {}
    for reply in replies:
        by_task.setdefault(reply.problem.benchmark.name, []).append(float(reply.correct))
    return HeldOutPoint(
        step=step,
        reward=round(fmean(r for r in rewards if r is not None), 4)
        if any(r is not None for r in rewards)
        else 0.0,
        accuracy=round(fmean(reply.correct for reply in replies), 4),
        false_claims=round(fmean(reply.is_false_claim for reply in replies), 4),
        forked=round(fmean(bool(reply.trajectory.blocks) for reply in replies), 4),
        critical_path=round(fmean(m.critical_path for m in metrics), 2),
        total=round(fmean(m.total for m in metrics), 2),
        accuracy_by_task={name: round(fmean(values), 4) for name, values in by_task.items()},
        seconds=round(time.monotonic() - began, 2),
    )
