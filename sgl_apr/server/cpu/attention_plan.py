"""Plans which query rows torch attends together, once per forward pass.

A row is one query token: a request that decodes is one row, and a short extension is one row per new token. Rows that
begin with the same slots (branches of one fork) form a family, whose common prefix is read once for all rows. The rest
of each row is padded only to rows of similar length.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeAlias

import torch

from sgl_apr.server.cpu.prefix_tree import PrefixNode, build_prefix_trees, unshared_rows

MAX_ROW_TOKENS = 16  # an extension of at most this many tokens is split into rows
QUERY_BLOCK = 512  # queries per call for longer ones after a prefix: bounds the mask, skips later keys
GROUP_COST = 1024  # the cost of one more group, in tokens read: sharing or splitting has to save more
GROUP_TOKENS = 8192  # padded tokens per group, so that gathered keys stay in the cores' caches

Family = tuple[list[int], int]  # rows, and the length of their common prefix
# A slice if the slots are consecutive, as after one prefill. It is read without a copy.
Slots: TypeAlias = torch.Tensor | slice


@dataclass(frozen=True, slots=True)
class RowGroup:
    """Rows that are attended at once: b rows, p shared slots, and m further slots for each row."""

    size: int  # b
    prefix: int  # p, may be 0
    shared: Slots  # [p] cache slots that begin every row
    own: torch.Tensor  # [b, heads, m] slot * heads + head, for a cache seen as [slots * heads, dim]
    padding: torch.Tensor | None  # [b, m], True after the end of a row


@dataclass(frozen=True, slots=True)
class QuerySpan:
    """Queries `start` to `stop` of one request, which come after `prefix` cached tokens."""

    start: int
    stop: int
    prefix: int
    slots: Slots  # [prefix + stop - start]


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """The plan for a batch: every query token is in at most one group or span, and the groups take `rows` in turn."""

    rows: torch.Tensor | None  # places in the query tensor; None if that is every token in order
    groups: tuple[RowGroup, ...]
    spans: tuple[QuerySpan, ...] = ()


def plan_decode(
    slots: torch.Tensor,
    requests: torch.Tensor,
    lengths: Sequence[int],
    heads: int,
    *,
    share: bool = True,
    workers: Collection[int] = (),
) -> AttentionPlan:
    """Plan a batch that decodes.

    Args:
        slots: [requests, context], SGLang's req_to_token.
        requests: [b], the batch's places in `slots`.
        lengths: Tokens of each request.
        heads: Key heads.
        share: Whether to share common prefixes.
        workers: Rows to leave out.
    """
    rows = [row for row in range(len(lengths)) if row not in workers]
    if len(rows) < len(lengths):
        requests = requests[rows]
    own_lengths = [lengths[row] for row in rows]
    trees = build_prefix_trees(slots, requests, own_lengths) if share else unshared_rows(own_lengths)
    order, groups = _groups(slots, requests, own_lengths, heads, trees)
    order = [rows[i] for i in order]
    in_order = order == list(range(len(lengths)))
    return AttentionPlan(None if in_order else torch.tensor(order, dtype=torch.long), groups)


def plan_extend(
    slots: torch.Tensor, requests: torch.Tensor, prefixes: Sequence[int], new: Sequence[int], heads: int
) -> AttentionPlan:
    """Plan a batch that extends requests.

    Args:
        slots: [requests, context], SGLang's req_to_token.
        requests: [b], the batch's places in `slots`.
        prefixes: Cached tokens of each request.
        new: New tokens of each request.
        heads: Key heads.
    """
    spans: list[QuerySpan] = []
    places: list[int] = []
    owners: list[int] = []
    lengths: list[int] = []
    for i, (prefix, count, stop) in enumerate(zip(prefixes, new, accumulate(new), strict=True)):
        start = stop - count
        if prefix and count <= MAX_ROW_TOKENS:
            places += range(start, stop)
            owners += [i] * count
            lengths += range(prefix + 1, prefix + count + 1)
            continue
        for first in range(start, stop, QUERY_BLOCK if prefix else count) if count else ():
            last = min(first + QUERY_BLOCK, stop) if prefix else stop
            before = prefix + first - start
            spans.append(QuerySpan(first, last, before, _slots(slots[requests[i], : before + last - first])))
    owned = requests[torch.tensor(owners, dtype=torch.long)]
    order, groups = _groups(slots, owned, lengths, heads, build_prefix_trees(slots, owned, lengths))
    return AttentionPlan(torch.tensor([places[row] for row in order], dtype=torch.long), groups, tuple(spans))


def _groups(
    slots: torch.Tensor,
    requests: torch.Tensor,
    lengths: Sequence[int],
    heads: int,
    trees: Sequence[PrefixNode],
) -> tuple[list[int], tuple[RowGroup, ...]]:
    """Return the rows in the order in which the groups take them, and the groups."""
    if not lengths:
        return [], ()
    table = slots[requests, : max(lengths)]
    order: list[int] = []
    groups: list[RowGroup] = []
    for family, prefix in _families(trees, lengths):
        for rows in _split_by_length(family, [lengths[row] - prefix for row in family], GROUP_COST + prefix):
            ends = torch.tensor([lengths[row] - prefix for row in rows])
            longest = int(ends.max())
            own = table[rows, prefix : prefix + longest]
            padding = torch.arange(longest) >= ends[:, None] if int(ends.min()) < longest else None
            if padding is not None:  # a stale slot may hold anything, even NaN; the row's first slot is valid
                own = torch.where(padding, own[:, :1], own)
            by_head = own[:, None] * heads + torch.arange(heads, dtype=own.dtype)[:, None]
            groups.append(RowGroup(len(rows), prefix, _slots(table[rows[0], :prefix]), by_head, padding))
            order += rows
    return order, tuple(groups)


def _slots(slots: torch.Tensor) -> Slots:
    if not slots.numel() or not bool((slots.diff() == 1).all()):
        return slots
    return slice(int(slots[0]), int(slots[-1]) + 1)


def _families(trees: Sequence[PrefixNode], lengths: Sequence[int]) -> list[Family]:
    """Cut the trees into families so that reading every common prefix once saves most.

    Rows that share little form the last family, without a common prefix.
    """

    def split(node: PrefixNode) -> tuple[int, list[Family], list[int]]:
        """Return (tokens saved, families, remaining rows)."""
        rows = list(node.rows)
        # Every row keeps at least one slot of its own.
        prefix = min(node.shared_length, min(lengths[row] for row in rows) - 1)
        saved_as_one = prefix * (len(rows) - 1) - GROUP_COST
        saved, families, remaining = 0, list[Family](), list[int]()
        for child in node.children:
            child_saved, child_families, child_remaining = split(child)
            saved += child_saved
            families += child_families
            remaining += child_remaining
        if saved_as_one > 0 and saved_as_one >= saved:
            return saved_as_one, [(rows, prefix)], []
        return saved, families, remaining if families else rows

    families: list[Family] = []
    unshared: list[int] = []
    for tree in trees:
        _, tree_families, remaining = split(tree)
        families += tree_families
        unshared += remaining
    return families + ([(sorted(unshared), 0)] if unshared else [])


def _split_by_length(rows: list[int], lengths: Sequence[int], cost: int) -> list[list[int]]:
    """Split rows, longest first, where padding would cost more than another group, or a group gets too large."""
    parts: list[list[int]] = []
    longest = waste = 0
    for length, row in sorted(zip(lengths, rows, strict=True), reverse=True):
        full = parts and (len(parts[-1]) + 1) * longest > GROUP_TOKENS
        if not parts or full or waste + longest - length > cost:
            parts.append([])
            longest, waste = length, 0
        parts[-1].append(row)
        waste += longest - length
    return parts if len(parts) > 1 else [rows]
