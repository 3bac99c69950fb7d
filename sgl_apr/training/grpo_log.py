"""The log of GRPO: one line for each step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean

from sgl_apr.errors import AprError
from sgl_apr.training.ppo import UpdateStatistics
from sgl_apr.training.rollouts import Rollout


@dataclass(frozen=True, slots=True)
class GrpoStepLog:
    """One step, and one line of the log; means over the replies of the step.

    Attributes:
        step: Counted from 0.
        weights: The server's version of the weights that wrote the replies.
        reward: Mean reward.
        accuracy: Share of correct replies.
        false_claims: Share of replies with an answer that is wrong.
        total: Decoded tokens.
        critical_path: Tokens of the critical path.
        forked: Share of replies with a fork.
        forked_by_size: The same by the size of the problem: for Countdown, how many numbers it has.
        width: Branches per fork.
        norm: See `UpdateStatistics`, as for those that follow.
        gradient_cosine: See `norm`.
        logprob_error: See `norm`.
        clipped: See `norm`.
        kl: See `norm`.
        sample_s: Seconds of sampling.
        learn_s: Seconds of the update.
    """

    step: int
    weights: str
    reward: float
    accuracy: float
    false_claims: float
    total: float
    critical_path: float
    forked: float
    forked_by_size: dict[str, float]
    width: float
    norm: float
    gradient_cosine: float
    logprob_error: float
    clipped: float
    kl: float
    sample_s: float
    learn_s: float

    @classmethod
    def from_replies(
        cls,
        step: int,
        replies: Sequence[Rollout],
        rewards: Sequence[float | None],
        statistics: UpdateStatistics,
        *,
        sample_s: float,
        learn_s: float,
    ) -> GrpoStepLog:
        """Summarize the replies of a step and the update that followed.

        Raises:
            AprError: If the replies came from several weights.
        """

        def mean(values: Sequence[float]) -> float:
            return round(fmean(values), 4) if values else 0.0

        versions = {c.weight_version for r in replies for c in r.trajectory.calls if c.weight_version}
        if len(versions) > 1:
            raise AprError(f"replies of one step came from several weights: {sorted(versions)}")
        metrics = [reply.trajectory.metrics() for reply in replies]
        forked: dict[int, list[float]] = {}
        for reply in replies:
            forked.setdefault(reply.problem.case.size, []).append(float(bool(reply.trajectory.blocks)))
        return cls(
            step=step,
            weights=next(iter(versions), ""),
            reward=mean([r for r in rewards if r is not None]),
            accuracy=mean([float(r.correct) for r in replies]),
            false_claims=mean([float(r.is_false_claim) for r in replies]),
            total=mean([m.total for m in metrics]),
            critical_path=mean([m.critical_path for m in metrics]),
            forked=mean([value for values in forked.values() for value in values]),
            forked_by_size={f"{size}": mean(values) for size, values in sorted(forked.items())},
            width=mean([float(len(b.branches)) for r in replies for b in r.trajectory.blocks]),
            **{name: round(value, 5) for name, value in asdict(statistics).items()},
            sample_s=round(sample_s, 2),
            learn_s=round(learn_s, 2),
        )
