"""The tree has the number of shared slots of every two rows, and loses no row."""

from __future__ import annotations

from itertools import combinations, takewhile

import torch
from hypothesis import given
from hypothesis import strategies as st

from sgl_apr.server.cpu.prefix_tree import PrefixNode, build_prefix_trees, unshared_rows

ROWS = st.lists(st.lists(st.integers(0, 2**31 - 1) | st.integers(0, 2), min_size=1, max_size=6), max_size=8)


def trees_of(rows: list[list[int]]) -> list[PrefixNode]:
    table = torch.full(
        (len(rows), 8), 7, dtype=torch.int32
    )  # the slots after the end of a row are the same for all
    for i, row in enumerate(rows):
        table[len(rows) - 1 - i, : len(row)] = torch.tensor(row)
    return build_prefix_trees(table, torch.arange(len(rows)).flip(0), [len(row) for row in rows])


def in_common(left: list[int], right: list[int]) -> int:
    return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False))))


@given(ROWS)
def test_the_tree_has_the_shared_length_of_every_two_rows(rows):
    lengths = {}

    def walk(node: PrefixNode, min_length: int) -> None:
        child_rows = [row for child in node.children for row in child.rows]
        assert sorted(child_rows) == sorted(node.rows) if node.children else len(node.rows) == 1
        assert node.shared_length >= min_length
        for one, other in combinations(node.children, 2):
            lengths.update({frozenset((i, j)): node.shared_length for i in one.rows for j in other.rows})
        for child in node.children:
            walk(child, node.shared_length + 1 if child.children else node.shared_length)

    trees = trees_of(rows)
    for tree in trees:
        walk(tree, 1)
    for one, other in combinations(trees, 2):
        lengths.update({frozenset((i, j)): 0 for i in one.rows for j in other.rows})
    assert sorted(row for tree in trees for row in tree.rows) == list(range(len(rows)))
    assert lengths == {
        frozenset((i, j)): in_common(rows[i], rows[j]) for i, j in combinations(range(len(rows)), 2)
    }


def test_nested_forks():
    inner = PrefixNode((0, 1), 3, (PrefixNode((0,), 4), PrefixNode((1,), 4)))
    outer = PrefixNode((0, 1, 2), 2, (inner, PrefixNode((2,), 3)))
    assert trees_of([[5, 9, 2, 1], [5, 9, 2, 3], [5, 9, 8], [4]]) == [PrefixNode((3,), 1), outer]


def test_unshared_rows_are_not_compared():
    assert unshared_rows([3, 1]) == [PrefixNode((0,), 3), PrefixNode((1,), 1)]
