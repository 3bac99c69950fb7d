"""The final text of a trajectory, also of one that ends with its branches."""

from __future__ import annotations

from sgl_apr.trajectory.trajectory import Trajectory


def ends_with_branches(trajectory: Trajectory) -> bool:
    """Whether nothing follows the last branches, as in a fork of a context without a merge."""
    return bool(trajectory.spans) and trajectory.spans[-1].path != ()


def final_text(trajectory: Trajectory) -> str:
    """Return the answer. Where nothing follows the last branches, it is the texts of those that ended by themselves."""
    if trajectory.answer or not ends_with_branches(trajectory):
        return trajectory.answer
    branches = trajectory.blocks[-1].branches
    return "\n\n".join(branch.text.strip() for branch in branches if branch.finish in ("stop", "eos"))
