"""A prefix tree of token sequences, which are merged as they are inserted, with KV joins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Cursor:
    """A position in the tree.

    Attributes:
        node: The last node of the sequence, -1 at the root.
        ends: After a join: the last nodes of all joined branches.
        join_group: What starts in one group is never merged with what starts in another. Branches that will be joined stay
            separate even if their text is the same, as they do in a KV cache that is read after the join.
    """

    node: int = -1
    ends: tuple[int, ...] = ()
    join_group: int = 0

    @property
    def nodes(self) -> tuple[int, ...]:
        """The nodes that the next token follows."""
        return self.ends or ((self.node,) if self.node >= 0 else ())


ROOT = Cursor()


@dataclass(slots=True)
class _Run:
    """Consecutive nodes: `first` is the first of them, which follows `at`; `runs` branch off from them."""

    first: int
    ids: Ints
    depth: int
    at: Cursor
    runs: list[_Run] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class FlatTree:
    """A tree of n tokens, flattened depth first.

    Attributes:
        token_ids: (n,).
        positions: (n,), the length of the longest chain that ends before the token.
        parents: (n,), index of the token that predicts this one; -1 at a root and directly after a join.
        ends: (n,), index after the last descendant.
        joined: (k, 3), rows (index, first, last): the token is also visible from `first` up to `last`, after a join.
    """

    token_ids: Ints
    positions: Ints
    parents: Ints
    ends: Ints
    joined: Ints

    def slice_tokens(self, begin: int, end: int) -> FlatTree:
        """The tokens from `begin` to `end`, which must be complete trees."""
        own = (self.joined[:, 0] >= begin) & (self.joined[:, 0] < end)
        here = slice(begin, end)
        cut = FlatTree(
            self.token_ids[here], self.positions[here], self.parents[here], self.ends[here], self.joined[own]
        )
        return cut.shifted(-begin)

    def shifted(self, by: int) -> FlatTree:
        """The same tree, `by` tokens further on in its row."""
        parents = np.where(self.parents < 0, -1, self.parents + by).astype(np.int32)
        move = np.int32(by)
        return replace(self, parents=parents, ends=self.ends + move, joined=self.joined + move)

    def concatenate(self, others: Sequence[FlatTree]) -> FlatTree:
        """This tree and others in one row, each shifted to its place."""
        rows = [self, *others]
        names = ("token_ids", "positions", "parents", "ends", "joined")
        return FlatTree(*(np.concatenate([getattr(row, name) for row in rows]) for name in names))


class Trie:
    """A prefix tree; nodes are numbered in the order of insertion.

    A token that follows the same nodes as an equal one is the same node.

    Examples:
        >>> trie = Trie()
        >>> _ = trie.insert(ROOT, [1, 2, 3]), trie.insert(ROOT, [1, 2, 4])
        >>> flat, index = trie.flatten()
        >>> flat.token_ids.tolist(), flat.positions.tolist()
        ([1, 2, 3, 4], [0, 1, 2, 2])
    """

    def __init__(self) -> None:
        self._runs: list[_Run] = []  # in the order of their first nodes
        self._run_of_node: list[int] = []  # the run of every node
        self._children: dict[tuple[Cursor, int], int] = {}  # where a run branches off: its first node

    def __len__(self) -> int:
        return len(self._run_of_node)

    def insert(self, cursor: Cursor, ids: Sequence[int]) -> tuple[Cursor, Ints]:
        """Insert ids after a cursor.

        Returns:
            The cursor after the last of them, and the node of each.
        """
        new = np.asarray(ids, dtype=np.int32)
        nodes, done = np.empty(len(new), dtype=np.int32), 0
        while done < len(new):
            node = self._find_child(cursor, int(new[done]))
            if node is None:
                node = self._add_run(cursor, new[done:])
            run = self._runs[self._run_of_node[node]]
            known = run.ids[node - run.first :][: len(new) - done]
            different = np.flatnonzero(known != new[done : done + len(known)])
            same = int(different[0]) if len(different) else len(known)
            nodes[done : done + same] = np.arange(node, node + same)
            done += same
            cursor = Cursor(node + same - 1)
        return cursor, nodes

    def join(self, fork: Cursor, ends: Sequence[Cursor]) -> Cursor:
        """The cursor after all of `ends`, which branched off at `fork` and do not see one another."""
        nodes = tuple(dict.fromkeys(node for end in ends for node in end.nodes))
        return Cursor(fork.node, nodes)

    def depth(self, node: int) -> int:
        """The position of a node; -1 for the root."""
        if node < 0:
            return -1
        run = self._runs[self._run_of_node[node]]
        return run.depth + node - run.first

    def _find_child(self, cursor: Cursor, token: int) -> int | None:
        """The node of a token after a cursor, if there is one."""
        if cursor.node >= 0 and not cursor.ends and not cursor.join_group:
            run, following = self._runs[self._run_of_node[cursor.node]], cursor.node + 1
            if following < run.first + len(run.ids) and run.ids[following - run.first] == token:
                return following
        return self._children.get((cursor, token))

    def _add_run(self, cursor: Cursor, ids: Ints) -> int:
        first = len(self._run_of_node)
        depth = 1 + max((self.depth(node) for node in cursor.nodes), default=-1)
        run = _Run(first, ids, depth, cursor)
        if cursor.node >= 0:
            self._runs[self._run_of_node[cursor.node]].runs.append(run)
        self._run_of_node += [len(self._runs)] * len(ids)
        self._runs.append(run)
        self._children[cursor, int(ids[0])] = first
        return first

    def flatten(self) -> tuple[FlatTree, Ints]:
        """Flatten the tree depth first, in O(n) time and memory.

        Returns:
            The flat tree, and the index of every node in it.
        """
        n = len(self._run_of_node)
        sizes = [len(run.ids) for run in self._runs]
        for run, size in zip(reversed(self._runs), reversed(sizes), strict=True):
            if run.at.node >= 0:
                sizes[self._run_of_node[run.at.node]] += size  # complete by now: descendants come later
        token_ids, positions, parents, ends, index = (np.empty(n, dtype=np.int32) for _ in range(5))
        starts = dict[int, int]()
        at = 0
        for k, run in enumerate(self._runs):
            if run.at.node < 0:
                starts[k], at = at, at + sizes[k]
            begin, length = starts[k], len(run.ids)
            here = slice(begin, begin + length)
            index[run.first : run.first + length] = np.arange(begin, begin + length)
            token_ids[here] = run.ids
            positions[here] = np.arange(run.depth, run.depth + length)
            parents[here] = np.arange(begin - 1, begin + length - 1)
            parents[begin] = index[run.at.node] if run.at.node >= 0 and not run.at.ends else -1
            ends[here] = end = begin + length
            # The run that branches off last comes first, so that the descendants of every token are contiguous.
            for child in sorted(run.runs, key=lambda child: -child.at.node):
                own = self._run_of_node[child.first]
                starts[own] = end
                end += sizes[own]
                ends[begin : begin + child.at.node - run.first + 1] = end
        return FlatTree(token_ids, positions, parents, ends, self._joined_rows(index, ends)), index

    def _joined_rows(self, index: Ints, ends: Ints) -> Ints:
        rows = [np.empty((0, 3), dtype=np.int32)]
        for run in self._runs:
            if not run.at.ends:
                continue
            tokens, begin = self._joined_nodes(run.at), index[run.first]
            row = np.empty((len(tokens), 3), dtype=np.int32)
            row[:, 0], row[:, 1], row[:, 2] = index[tokens], begin, ends[begin]
            rows.append(row)
        return np.concatenate(rows)

    def _joined_nodes(self, cursor: Cursor) -> Ints:
        """The nodes from the fork of a joined cursor to its ends."""
        last = dict[int, int]()  # by run: the last node that is included
        pieces, stack = [np.empty(0, dtype=np.int32)], list(cursor.ends)
        while stack:
            node = stack.pop()
            if node < 0 or node == cursor.node:
                continue
            own = self._run_of_node[node]
            run, known = self._runs[own], last.get(own)
            if known is not None and known >= node:
                continue
            inside = run.first <= cursor.node < node  # the fork is in the same run
            first = cursor.node + 1 if inside else run.first
            pieces.append(np.arange(first if known is None else known + 1, node + 1, dtype=np.int32))
            last[own] = node
            if known is None and not inside:
                stack += [*run.at.ends, run.at.node]
        return np.concatenate(pieces)
