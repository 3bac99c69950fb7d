"""The attention mask of a layout as a dense matrix: the reference that sparse forms are checked against."""

from __future__ import annotations

from sgl_apr.trajectory.join_layout import Layout, masked_ranges


def dense_mask(layout: Layout) -> list[list[bool]]:
    """Return for every token which tokens it sees, itself included, in O(n^2)."""
    hidden = list(masked_ranges(layout))
    return [
        [j <= i and not any(first <= j < last for first, last in ranges) for j in range(len(hidden))]
        for i, ranges in enumerate(hidden)
    ]
