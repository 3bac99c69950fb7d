"""What a reply is worth, as pure functions of a trajectory and of whether its answer is right; nothing is judged here."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from sgl_apr.errors import AprError
from sgl_apr.formats.dialects import dialect
from sgl_apr.formats.lenient_parser import Reading
from sgl_apr.trajectory.trajectory import Trajectory

Reward = Callable[[Trajectory, bool], float | None]  # None: the reply does not count

STRUCTURE_PENALTY, STRAY_TEXT_PENALTY, ADJACENCY_PENALTY, NO_BLOCK_PENALTY = (
    -1.0,
    -0.4,
    -0.2,
    -1.5,
)  # NPR's penalties
LOWEST_FORMAT_SCORE = -1.9  # of all of them together: the format penalty lies in (-2, 0]


def well_formed(trajectory: Trajectory) -> bool:
    """Whether it forked at least once, and nothing of it left the dialect."""
    return bool(trajectory.blocks) and all(s.finish != "malformed" for s in trajectory.spans)


def accuracy(trajectory: Trajectory, correct: bool) -> float:
    """1 for a right answer, else 0: the outcome alone."""
    return float(correct)


def gated(trajectory: Trajectory, correct: bool, *, parallel: float = 1.0, length: float = 0.0) -> float:
    """`R = 1[correct] * (1 + parallel * (1 - L_critical / L_total) - length * L_critical / 1000)`.

    The accuracy gate on ThreadWeaver's acceleration ratio (arXiv 2512.07843, section 5), unbounded by a cap, and
    on the length of the critical path, since the ratio alone also rises with what is written in vain. A wrong
    answer never earns anything, and a right one at least 0.
    """
    if not correct:
        return 0.0
    metrics = trajectory.metrics()
    return max(0.0, 1 + parallel * metrics.acceleration - length * metrics.critical_path / 1000)


def threadweaver(
    trajectory: Trajectory,
    correct: bool,
    *,
    wrong: float = -1.0,
    weight: float = 0.5,
    max_acceleration: float = 0.2,
) -> float:
    """ThreadWeaver as released (arXiv 2512.07843): 1 and a bonus of `weight * min(acceleration, most)`, or `wrong`.

    Their code says -1 for a wrong answer, their text 0.
    """
    return 1 + weight * min(trajectory.metrics().acceleration, max_acceleration) if correct else wrong


def parallel_r1(trajectory: Trajectory, correct: bool, *, step: int) -> float:
    """Parallel-R1's alternating schedule (arXiv 2509.07980): accuracy in 8 of every 10 steps, structure in 2.

    In the former 1 or -1; in the latter 1.2 for a right answer with a well-formed block, 1 for one without a
    block, else -1. `step` counts the training steps from 0.
    """
    if step % 10 < 8 or not correct:
        return 1.0 if correct else -1.0
    if not trajectory.blocks:
        return 1.0
    return 1.2 if well_formed(trajectory) else -1.0


def parallel_r1_product(trajectory: Trajectory, correct: bool) -> float:
    """Parallel-R1's other reward: accuracy times format times parallel, each 0 or 1."""
    return float(correct and well_formed(trajectory))


def npr_format(reading: Reading) -> float:
    """NPR's format penalty of stage 1, from 0 for a clean reply with a block down to `LOWEST`.

    Each kind of defect counts once: -1 for wrong counts, missing or stray tags; -0.4 for text among the
    plans; -0.2 for text between tags that follow one another; -1.5 where there is no block at all.
    """
    trajectory = reading.trajectory
    if not trajectory.blocks:
        return NO_BLOCK_PENALTY
    text, grammar = trajectory.text, dialect(trajectory.dialect).grammar
    opening, ending = grammar.opening_literal("fork"), grammar.closing_literal("fork")
    found = set[float]()
    for defect in reading.defects:
        if defect.name == "text where none belongs":
            before = text[: defect.offset]
            found.add(
                STRAY_TEXT_PENALTY if before.rfind(opening) > before.rfind(ending) else ADJACENCY_PENALTY
            )
        elif defect.name == "missing white space":
            found.add(ADJACENCY_PENALTY)
        else:
            found.add(STRUCTURE_PENALTY)
    return max(LOWEST_FORMAT_SCORE, sum(found))


def npr(trajectory: Trajectory, correct: bool) -> float | None:
    """NPR's stage 2: accuracy; None for a malformed rollout, which is dropped before PAPO's advantages."""
    return float(correct) if well_formed(trajectory) or not trajectory.blocks else None


def apr(trajectory: Trajectory, correct: bool, *, length: float = 0.0, threads: float = 0.0) -> float:
    """APR's reward (arXiv 2504.15466): the outcome, with optional terms for a short critical path and for threads.

    `length` is taken off for each 1,000 tokens of the critical path, `threads` is paid for each branch; both
    are 0 there.
    """
    metrics = trajectory.metrics()
    return float(correct) - length * metrics.critical_path / 1000 + threads * metrics.branches


def naive_threads(trajectory: Trajectory, correct: bool, *, each: float = 0.1) -> float:
    """A reward that is gamed, kept as a warning: each branch is paid for, whatever it is good for.

    Empty branches behind a wrong answer earn more than a right one; see the tests.
    """
    return float(correct) + each * trajectory.metrics().branches


def reward(name: str, *, step: int = 0, parallel: float = 1.0, length: float = 0.0) -> Reward:
    """The reward of that name, in a training step, with the weights of its terms where it has them: of what runs
    in parallel ("gated"), and of the critical path ("gated", "apr").

    Raises `AprError` that lists the names.
    """
    known: dict[str, Reward] = {
        "accuracy": accuracy,
        "gated": partial(gated, parallel=parallel, length=length),
        "threadweaver": threadweaver,
        "parallel_r1": partial(parallel_r1, step=step),
        "parallel_r1_product": parallel_r1_product,
        "npr": npr,
        "apr": partial(apr, length=length),
        "naive_threads": naive_threads,
    }
    if name not in known:
        raise AprError(f"no reward {name!r}, expected one of {', '.join(known)}")
    return known[name]
