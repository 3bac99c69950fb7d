"""What every token of a trajectory sees, and its position: one rule for KV joins, training and reference; no tensors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Literal

from sgl_apr.errors import AprError
from sgl_apr.trajectory.join_layout import Layout, masked_ranges, layout_positions, token_count
from sgl_apr.trajectory.trajectory import Trajectory


@dataclass(frozen=True)
class Causality:
    """The tokens of a trajectory, prompt included, in the order of the text, and how they see one another.

    A token sees all before it but those of other branches of a block that it stands in. Its position is the
    length of its longest causal chain (Multiverse, arXiv 2506.09991, section 4; NPR, Parallel-R1 "unseen"):
    branches begin at the same one, and what follows a block goes on behind its longest branch.
    """

    token_ids: tuple[int, ...]
    layout: Layout

    @cached_property
    def positions(self) -> tuple[int, ...]:
        """Of every token."""
        return tuple(layout_positions(self.layout))

    @cached_property
    def masked_ranges(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """For every token the ranges [first, last) of earlier tokens that it does not see, outer blocks first."""
        return tuple(masked_ranges(self.layout))


def causality(trajectory: Trajectory, join: Literal["kv", "text"] | None = None) -> Causality:
    """That of all tokens of `trajectory`, with its blocks joined as it says, or all of them as `join` says.

    A block that was joined as text stands in a line, as it was read behind the join; so does one of which
    nothing is said. Raises `AprError` where no one order holds for all of it: branches that saw a message
    alone, or that ran beside their trunk; a join that the cache lost in the middle.
    """
    spans = trajectory.spans
    lost = [j for j in trajectory.joins if len(j.path) % 2 == 0]
    if lost and join is None:
        raise AprError(f"in the middle of this trajectory a join was lost: {lost[0].why}")
    joined = {j.path for j in trajectory.joins if j.by == "kv"}

    def sequence(indices: Iterable[int], depth: int, tips: tuple[int, ...]) -> tuple[Layout, tuple[int, ...]]:
        """The layout of the spans of one sequence, which follows `tips`, and what follows it in turn."""
        items: list[int | tuple[Layout, ...]] = []
        run = 0
        for block, group in groupby(indices, key=lambda i: spans[i].path[: depth + 1]):
            if len(block) == depth:
                for i in group:
                    if spans[i].parents != tips:
                        found = f"span {i} follows {spans[i].parents}, expected {tips}"
                        raise AprError(f"{found}: no one order holds for the tokens of this trajectory")
                    run, tips = run + spans[i].tokens, (i,)
                continue
            own = groupby(group, key=lambda i: spans[i].path[: depth + 2])
            branches, ends = zip(*(sequence(members, depth + 2, tips) for _, members in own), strict=True)
            tips = tuple(i for end in ends for i in end)
            if join == "kv" or (join is None and block in joined):
                items += [run, branches]
                run = 0
            else:
                run += sum(map(token_count, branches))
        return (*items, run), tips

    layout, _ = sequence(range(len(spans)), 0, ())
    return Causality(tuple(t for s in spans for t in s.token_ids or ()), layout)
