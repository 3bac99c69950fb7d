"""The attention structure of a trajectory: what each of its tokens sees, and the position of each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Literal

from sgl_apr.errors import AprError, SharedViewUnsupported
from sgl_apr.trajectory.join_layout import Layout, layout_positions, masked_ranges, token_count
from sgl_apr.trajectory.trajectory import Trajectory


@dataclass(frozen=True)
class Causality:
    """The tokens of a trajectory in the order of the text, and how they see one another.

    A token sees all tokens before it except those of other branches of a block that it stands in. Its position is
    the length of its longest causal chain (Multiverse, arXiv 2506.09991, section 4; NPR, Parallel-R1 "unseen"): all
    branches of a block begin at the same position, and what follows the block begins after its longest branch.

    Attributes:
        token_ids: The ids of all tokens, prompt included.
        layout: Which of them belong to parallel branches.
    """

    token_ids: tuple[int, ...]
    layout: Layout

    @cached_property
    def positions(self) -> tuple[int, ...]:
        """The position of every token."""
        return tuple(layout_positions(self.layout))

    @cached_property
    def masked_ranges(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """For every token the ranges [first, last) of earlier tokens that it does not see, outer blocks first."""
        return tuple(masked_ranges(self.layout))


def causality(trajectory: Trajectory, join: Literal["kv", "text"] | None = None) -> Causality:
    """Return how all tokens of a trajectory see one another.

    Args:
        trajectory: The trajectory, with token ids.
        join: Treat all blocks as joined in this way. By default each block as the trajectory records it, and as
            text where it records nothing. The branches of a text join are sequential: each sees those before it,
            as what follows the join does.

    Raises:
        AprError: No single order holds for all tokens: branches saw only a message, or ran in parallel to their
            trunk, or a call of a tool was dropped, or the cache lost a join in the middle.
        SharedViewUnsupported: Workers of a group saw one another's tokens as they were written.
    """
    spans = trajectory.spans
    if trajectory.groups:
        raise SharedViewUnsupported(
            f"block {trajectory.groups[0].path} is a group of workers ({trajectory.groups[0].kind}), whose tokens saw those of "
            "other branches as they were written: expected a trajectory in which a branch does not see the others"
        )
    if join is None and (lost := trajectory.lost_joins):
        raise AprError(f"the cache lost a join in the middle of this trajectory: {lost[0].why}")
    joined = {j.path for j in trajectory.joins if j.by == "kv"}
    prompt_layout = trajectory.joined_prefix

    def sequence(
        indices: Iterable[int], depth: int, frontier: tuple[int, ...]
    ) -> tuple[Layout, tuple[int, ...]]:
        """The layout of one sequence whose first span follows `frontier`, and the frontier after it."""
        items: list[int | Sequence[Layout]] = []
        run = 0
        if not frontier and join != "text":
            items += prompt_layout
            run -= token_count(prompt_layout)
        for block, group in groupby(indices, key=lambda i: spans[i].path[: depth + 1]):
            if len(block) == depth:
                for i in group:
                    if spans[i].parents != frontier:
                        raise AprError(
                            f"span {i} follows {spans[i].parents}, expected {frontier}: "
                            "no one order holds for the tokens of this trajectory"
                        )
                    run, frontier = run + spans[i].tokens, (i,)
                continue
            own = groupby(group, key=lambda i: spans[i].path[: depth + 2])
            branches, ends = zip(*(sequence(members, depth + 2, frontier) for _, members in own), strict=True)
            frontier = tuple(i for end in ends for i in end)
            if join == "kv" or (join is None and block in joined):
                items += [run, branches]
                run = 0
            else:
                run += sum(map(token_count, branches))
        return (*items, run), frontier

    layout, _ = sequence(range(len(spans)), 0, ())
    return Causality(tuple(t for s in spans for t in s.token_ids or ()), layout)


def context_layout(trajectory: Trajectory) -> Layout | None:
    """Return how the beginning of `Trajectory.context_ids` is joined in the KV cache, up to the end of the last join.

    Returns:
        The layout: empty if the context is one sequence. None if that is not known, since parts of the trajectory are
        not in its context.
    """
    if any(not join.path for join in trajectory.lost_joins):
        return ()  # the trunk was read as text from then on
    if not trajectory.prompt_layout and all(join.by != "kv" for join in trajectory.joins):
        return ()
    try:
        graph = causality(trajectory)
    except AprError:
        return None
    if graph.token_ids != trajectory.context_ids:
        return None
    blocks = [index for index, item in enumerate(graph.layout) if not isinstance(item, int)]
    return tuple(graph.layout[: blocks[-1] + 1]) if blocks else ()
