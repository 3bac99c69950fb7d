"""Credit assignment: the advantage of what the trunk decoded is that of the reply, and that of what branches decoded is configured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from sgl_apr.training.advantages import Advantages, group_advantages
from sgl_apr.training.grpo_config import BranchCredit
from sgl_apr.trajectory.blocks import Branch
from sgl_apr.trajectory.spans import Path
from sgl_apr.trajectory.trajectory import Trajectory

UNJUDGED = ("aborted", "failed", "timeout")  # outcomes of branches that did not get to say what they found


def sequence_advantages(
    trajectory: Trajectory, advantage: float, credit: BranchCredit, own: Mapping[Path, float]
) -> dict[Path, float]:
    """The advantage of what each sequence of a reply decoded, by its path.

    Args:
        trajectory: The reply.
        advantage: Its advantage, which the trunk gets.
        credit: What branches get: "group" is the advantage of the reply, "own" that of the branch, "trunk" is nothing.
        own: Advantages of its branches by their paths, for "own".
    """
    if credit == "own":
        return {(): advantage, **own}
    branches = [branch.path for block in trajectory.blocks for branch in block.branches]
    return {(): advantage, **dict.fromkeys(branches, advantage if credit == "group" else 0.0)}


def branch_advantages(
    groups: Sequence[Sequence[Trajectory]],
    solves: Sequence[Callable[[str], bool]],
    kind: Advantages,
) -> list[dict[Path, float]]:
    """How much better each branch did than all branches of the replies to the same problem.

    A branch earns 1 if what it returned or wrote solves the problem, else 0. Branches that were aborted are left out.

    Args:
        groups: The replies to each problem.
        solves: For each problem: whether the text of a branch solves it.
        kind: How rewards become advantages.

    Returns:
        For each reply, one group after another, the advantages of its branches by their paths.
    """
    branches = [[judged_branches(trajectory) for trajectory in group] for group in groups]
    rewards = [
        [float(solve(branch.result or branch.text)) for reply in group for branch in reply]
        for group, solve in zip(branches, solves, strict=True)
    ]
    values = iter([value for group in group_advantages(kind, rewards) for value in group])
    return [{branch.path: next(values) for branch in reply} for group in branches for reply in group]


def judged_branches(trajectory: Trajectory) -> list[Branch]:
    """The branches of a reply that ended by themselves or by a limit, nested ones included."""
    return [
        branch for block in trajectory.blocks for branch in block.branches if branch.outcome not in UNJUDGED
    ]
