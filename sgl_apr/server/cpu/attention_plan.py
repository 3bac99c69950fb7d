"""Which query rows torch attends together, decided once per forward pass; no keys or values are touched here.

A row is one query token: a request that decodes is one row, and a short extension is one row per new token.
Rows whose first slots are the same (branches of one fork) form a family: their common prefix is read once
for all of them. What is left of each row is padded only to rows of similar length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeAlias

import torch

from sgl_apr.server.cpu.prefix_tree import PrefixNode, build_prefix_trees, unshared_rows

MAX_ROW_TOKENS = 16  # an extension of up to so many tokens is taken apart into rows
QUERY_BLOCK = 512  # queries per call for longer ones after a prefix: bounds the mask, skips keys to come
GROUP_COST = 1024  # what one more group costs, in tokens read: sharing or splitting has to save more
GROUP_TOKENS = 8192  # padded tokens per group, so that what is gathered stays near the cores

Family = tuple[list[int], int]  # rows, and the length of their common prefix
# A slice where they follow each other, as after one prefill: read without a copy.
Slots: TypeAlias = torch.Tensor | slice


@dataclass(frozen=True, slots=True)
class RowGroup:
    """Rows that are attended at once. Shapes: b rows, p shared slots, m further slots for each row."""

    size: int  # b
    prefix: int  # p, may be 0
    shared: Slots  # [p] cache slots that begin every row
    own: torch.Tensor  # [b, heads, m] slot * heads + head, for a cache seen as [slots * heads, dim]
    padding: torch.Tensor | None  # [b, m], True where a row has ended


@dataclass(frozen=True, slots=True)
class QuerySpan:
    """Queries `start` to `stop` of one request, which come after `prefix` cached tokens."""

    start: int
    stop: int
    prefix: int
    slots: Slots  # [prefix + stop - start]


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """Every query token of a batch is in exactly one group or span; the groups take `rows` in turn."""

    rows: torch.Tensor | None  # places in the query tensor; None if that is every token in order
    groups: tuple[RowGroup, ...]
    spans: tuple[QuerySpan, ...] = ()


def plan_decode(
    slots: torch.Tensor, requests: torch.Tensor, lengths: Sequence[int], heads: int, *, share: bool = True
) -> AttentionPlan:
    """`slots` [requests, context] is SGLang's req_to_token, `requests` [b] the batch's places in it.

    Without `share` no two requests have a prefix in common.
    """
    trees = build_prefix_trees(slots, requests, lengths) if share else unshared_rows(lengths)
    order, groups = _groups(slots, requests, lengths, heads, trees)
    in_order = order == list(range(len(lengths)))
    return AttentionPlan(None if in_order else torch.tensor(order), groups)


def plan_extend(
    slots: torch.Tensor, requests: torch.Tensor, prefixes: Sequence[int], new: Sequence[int], heads: int
) -> AttentionPlan:
    """`prefixes` and `new` count the cached and the new tokens of every request."""
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
    """The rows in the order in which the groups take them, and the groups."""
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
            if padding is not None:  # a stale slot may hold anything, even NaN; the row's own first is sound
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
    """Cuts the trees so that reading every common prefix once saves most; what shares little comes last."""

    def split(node: PrefixNode) -> tuple[int, list[Family], list[int]]:
        """(tokens saved, families, rows left over)"""
        rows = list(node.rows)
        prefix = min(
            node.shared_length, min(lengths[row] for row in rows) - 1
        )  # a slot at least stays a row's own
        together = prefix * (len(rows) - 1) - GROUP_COST
        apart, parts, left = 0, list[Family](), list[int]()
        for child in node.children:
            saved, inner, lonely = split(child)
            apart, parts, left = apart + saved, parts + inner, left + lonely
        if together > 0 and together >= apart:
            return together, [(rows, prefix)], []
        return apart, parts, left if parts else rows

    families: list[Family] = []
    alone: list[int] = []
    for tree in trees:
        _, parts, left = split(tree)
        families += parts
        alone += left
    return families + ([(sorted(alone), 0)] if alone else [])


def _split_by_length(rows: list[int], lengths: Sequence[int], cost: int) -> list[list[int]]:
    """Cuts rows, longest first, where padding would cost more than another group, or a group gets too big."""
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
