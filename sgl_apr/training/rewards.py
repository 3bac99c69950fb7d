"""Rewards: pure functions of a trajectory and of whether its answer is correct.

Tokens count without results of tools, which nobody learns to write: otherwise a policy could earn more by calling tools with
long results in its branches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from sgl_apr.errors import AprError
from sgl_apr.formats.dialects import dialect
from sgl_apr.formats.lenient_parser import Reading
from sgl_apr.trajectory.metrics import Convention, Metrics
from sgl_apr.trajectory.spans import Span
from sgl_apr.trajectory.trajectory import Trajectory

Reward = Callable[[Trajectory, bool], float | None]  # None drops the reply

STRUCTURE_PENALTY, STRAY_TEXT_PENALTY, ADJACENCY_PENALTY, NO_BLOCK_PENALTY = (
    -1.0,
    -0.4,
    -0.2,
    -1.5,
)  # NPR's penalties
LOWEST_FORMAT_SCORE = -1.9  # of all of them together: the format penalty lies in (-2, 0]


def is_malformed(trajectory: Trajectory) -> bool:
    """Whether the reply breaks a rule of its dialect somewhere, with or without a block that can be read."""
    return any(s.finish == "malformed" for s in trajectory.spans)


def well_formed(trajectory: Trajectory) -> bool:
    """Whether the reply forked at least once and followed its dialect throughout."""
    return bool(trajectory.blocks) and not is_malformed(trajectory)


def judged_trajectory(reading: Reading) -> Trajectory:
    """Return the trajectory of a text for a reward. If the text has defects, its last span is marked as malformed.

    `sgl_apr.read` repairs what it reads, so its trajectory alone does not show that the text is broken.

    Examples:
        >>> import sgl_apr as apr
        >>> [is_malformed(judged_trajectory(apr.read(text, "threadweaver"))) for text in ("42", "<Thread> 42")]
        [False, True]
    """
    spans = reading.trajectory.spans
    if reading.is_valid:
        return reading.trajectory
    last = (
        replace(spans[-1], finish="malformed")
        if spans
        else Span("text", "decoded", "", (), (), finish="malformed")
    )
    return replace(reading.trajectory, spans=(*spans[:-1], last))


def metrics_without_results(trajectory: Trajectory, convention: Convention = "causal") -> Metrics:
    """Return the metrics of a trajectory in which the results of tools have no tokens."""
    if not trajectory.tool_calls:
        return trajectory.metrics(convention)
    spans = tuple(replace(s, token_ids=()) if s.role == "observation" else s for s in trajectory.spans)
    return replace(trajectory, spans=spans).metrics(convention)


def accuracy(trajectory: Trajectory, correct: bool) -> float:
    """1 for a correct answer, else 0."""
    return float(correct)


def gated(trajectory: Trajectory, correct: bool, *, parallel: float = 1.0, length: float = 0.0) -> float:
    """`R = 1[correct] * (1 + parallel * (1 - L_critical / L_total) - length * L_critical / 1000)`.

    ThreadWeaver's acceleration ratio (arXiv 2512.07843, section 5) with an accuracy gate and without a cap, less a term
    for the length of the critical path, since the ratio alone also rises with useless text. A wrong answer earns nothing,
    and a correct one at least 0. A malformed reply has no parallel term.

    Args:
        trajectory: The reply.
        correct: Whether its answer is correct.
        parallel: Weight of the acceleration ratio.
        length: Subtracted for 1,000 tokens of the critical path.
    """
    if not correct:
        return 0.0
    metrics = metrics_without_results(trajectory)
    acceleration = 0.0 if is_malformed(trajectory) else metrics.acceleration
    return max(0.0, 1 + parallel * acceleration - length * metrics.critical_path / 1000)


def threadweaver(
    trajectory: Trajectory,
    correct: bool,
    *,
    wrong: float = -1.0,
    weight: float = 0.5,
    max_acceleration: float = 0.2,
) -> float:
    """ThreadWeaver's reward as released (arXiv 2512.07843): `1 + weight * min(acceleration, max_acceleration)`, or `wrong`.

    The acceleration is that of `Trajectory.metrics("threadweaver")`: the tags of threads are sequential, as in their code
    (`get_parallel_stats` in threadweaver_rl of github.com/facebookresearch/threadweaver), and so is the number that
    follows the first tag. Their code has -1 for a wrong answer, their paper 0. It counts the threads of a
    malformed reply, too, and has no penalty for it.
    """
    if not correct:
        return wrong
    return 1 + weight * min(
        metrics_without_results(trajectory, "threadweaver").acceleration, max_acceleration
    )


def parallel_r1(trajectory: Trajectory, correct: bool, *, step: int) -> float:
    """Parallel-R1's alternating schedule (arXiv 2509.07980): accuracy in 8 of every 10 steps, structure in 2.

    In accuracy steps it is 1 or -1. In structure steps it is 1.2 for a correct answer with a well-formed block, 1 for a
    correct answer without a block, else -1: also for a correct answer in a malformed reply.

    Args:
        trajectory: The reply.
        correct: Whether its answer is correct.
        step: The training step, counted from 0.
    """
    if step % 10 < 8 or not correct:
        return 1.0 if correct else -1.0
    if is_malformed(trajectory):
        return -1.0
    return 1.2 if trajectory.blocks else 1.0


def parallel_r1_product(trajectory: Trajectory, correct: bool) -> float:
    """Parallel-R1's other reward: accuracy times format times parallelism, each 0 or 1."""
    return float(correct and well_formed(trajectory))


def npr_format(reading: Reading) -> float:
    """NPR's format penalty of stage 1, from 0 for a valid reply with a block down to `LOWEST_FORMAT_SCORE`.

    Each kind of defect counts once: -1 for wrong counts, and for missing or stray tags; -0.4 for text among the plans; -0.2 for
    text between adjacent tags; -1.5 if there is no block at all.
    """
    trajectory = reading.trajectory
    if not trajectory.blocks:
        return NO_BLOCK_PENALTY
    text, grammar = trajectory.text, dialect(trajectory.dialect).grammar
    opening, ending = grammar.opening_literal("fork"), grammar.closing_literal("fork")
    penalties = set[float]()
    for defect in reading.defects:
        if defect.name == "text where none belongs":
            before = text[: defect.offset]
            penalties.add(
                STRAY_TEXT_PENALTY if before.rfind(opening) > before.rfind(ending) else ADJACENCY_PENALTY
            )
        elif defect.name == "missing white space":
            penalties.add(ADJACENCY_PENALTY)
        else:
            penalties.add(STRUCTURE_PENALTY)
    return max(LOWEST_FORMAT_SCORE, sum(penalties))


def npr(trajectory: Trajectory, correct: bool) -> float | None:
    """NPR's reward of stage 2: accuracy; None for a malformed reply, which is dropped before PAPO's advantages."""
    return None if is_malformed(trajectory) else float(correct)


def apr(trajectory: Trajectory, correct: bool, *, length: float = 0.0, threads: float = 0.0) -> float:
    """APR's reward (arXiv 2504.15466): the outcome, with optional terms for a short critical path and for threads.

    Args:
        trajectory: The reply.
        correct: Whether its answer is correct.
        length: Subtracted for 1,000 tokens of the critical path; 0 in the paper.
        threads: Added for each branch of a reply that is not malformed; 0 in the paper.
    """
    metrics = metrics_without_results(trajectory)
    branches = 0 if is_malformed(trajectory) else metrics.branches
    return float(correct) - length * metrics.critical_path / 1000 + threads * branches


def naive_threads(trajectory: Trajectory, correct: bool, *, each: float = 0.1) -> float:
    """A reward that can be gamed, kept as a warning: each branch earns `each`, whatever it contributes.

    Empty branches with a wrong answer earn more than a correct answer without branches; see the tests.
    """
    return float(correct) + each * trajectory.metrics().branches


def reward(name: str, *, step: int = 0, parallel: float = 1.0, length: float = 0.0) -> Reward:
    """The reward of a name.

    Args:
        name: One of the functions of this module.
        step: The training step, for "parallel_r1".
        parallel: Weight of the parallel term of "gated".
        length: Weight of the critical path in "gated" and "apr".

    Raises:
        AprError: If there is no such reward; the message lists the names.
    """
    rewards: dict[str, Reward] = {
        "accuracy": accuracy,
        "gated": partial(gated, parallel=parallel, length=length),
        "threadweaver": threadweaver,
        "parallel_r1": partial(parallel_r1, step=step),
        "parallel_r1_product": parallel_r1_product,
        "npr": npr,
        "apr": partial(apr, length=length),
        "naive_threads": naive_threads,
    }
    if name not in rewards:
        raise AprError(f"no reward {name!r}, expected one of {', '.join(rewards)}")
    return rewards[name]
