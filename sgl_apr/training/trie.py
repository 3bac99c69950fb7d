"""A prefix tree of token sequences that are merged as they are put in, KV joins included; it knows no trajectory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Cursor:
    """A place in the tree: behind node `node` (-1: at the root), and behind all of `ends` where they are joined.

    What begins in one `lane` is never merged with what begins in another: branches that are to be joined stay
    apart even where they say the same, as they do in a KV cache that is read behind the join.
    """

    node: int = -1
    ends: tuple[int, ...] = ()
    join_group: int = 0

    @property
    def nodes(self) -> tuple[int, ...]:
        """The nodes that what comes next follows."""
        return self.ends or ((self.node,) if self.node >= 0 else ())


ROOT = Cursor()


@dataclass(slots=True)
class _Run:
    """Consecutive nodes: `first` is the first of them, behind `at`; `runs` branch off from them."""

    first: int
    ids: Ints
    depth: int
    at: Cursor
    runs: list[_Run] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class FlatTree:
    """A tree in one line, depth first; n tokens.

    token_ids, positions: (n,). A position is the length of the longest chain that ends before the token.
    parents: (n,), the index of the token that predicts this one, -1 where none does: at a root, behind a join.
    ends: (n,), the index behind the last of its descendants.
    joined: (k, 3), rows (index, first, last): the token is also seen from `first` up to `last`, behind a join.
    """

    token_ids: Ints
    positions: Ints
    parents: Ints
    ends: Ints
    joined: Ints

    def slice_tokens(self, begin: int, end: int) -> FlatTree:
        """The tokens from `begin` to `end`, between which whole trees stand."""
        own = (self.joined[:, 0] >= begin) & (self.joined[:, 0] < end)
        here = slice(begin, end)
        cut = FlatTree(
            self.token_ids[here], self.positions[here], self.parents[here], self.ends[here], self.joined[own]
        )
        return cut.shifted(-begin)

    def shifted(self, by: int) -> FlatTree:
        """The same, so many tokens further on in a row."""
        parents = np.where(self.parents < 0, -1, self.parents + by).astype(np.int32)
        move = np.int32(by)
        return replace(self, parents=parents, ends=self.ends + move, joined=self.joined + move)

    def concatenate(self, others: Sequence[FlatTree]) -> FlatTree:
        """One row of this and others, which are shifted to where they stand."""
        rows = [self, *others]
        names = ("token_ids", "positions", "parents", "ends", "joined")
        return FlatTree(*(np.concatenate([getattr(row, name) for row in rows]) for name in names))


class Trie:
    """Nodes are numbered as they are put in; a token that follows the same ones as another is the same node.

    >>> trie = Trie()
    >>> _ = trie.insert(ROOT, [1, 2, 3]), trie.insert(ROOT, [1, 2, 4])
    >>> flat, index = trie.flat()
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
        """Ids behind a cursor: the cursor behind the last of them, and the node of each."""
        given = np.asarray(ids, dtype=np.int32)
        nodes, done = np.empty(len(given), dtype=np.int32), 0
        while done < len(given):
            node = self._find_child(cursor, int(given[done]))
            if node is None:
                node = self._add_run(cursor, given[done:])
            run = self._runs[self._run_of_node[node]]
            known = run.ids[node - run.first :][: len(given) - done]
            other = np.flatnonzero(known != given[done : done + len(known)])
            same = int(other[0]) if len(other) else len(known)
            nodes[done : done + same] = np.arange(node, node + same)
            done += same
            cursor = Cursor(node + same - 1)
        return cursor, nodes

    def join(self, fork: Cursor, ends: Sequence[Cursor]) -> Cursor:
        """Behind all of `ends`, which branched off at `fork` and do not see one another."""
        nodes = tuple(dict.fromkeys(node for end in ends for node in end.nodes))
        return Cursor(fork.node, nodes)

    def depth(self, node: int) -> int:
        """The position of a node; -1 for the root."""
        if node < 0:
            return -1
        run = self._runs[self._run_of_node[node]]
        return run.depth + node - run.first

    def _find_child(self, cursor: Cursor, token: int) -> int | None:
        """The node of a token behind a cursor, if there is one."""
        if cursor.node >= 0 and not cursor.ends and not cursor.join_group:
            run, behind = self._runs[self._run_of_node[cursor.node]], cursor.node + 1
            if behind < run.first + len(run.ids) and run.ids[behind - run.first] == token:
                return behind
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
        """All of it in a line, and where in it every node stands.

        In O(n) time and memory, and a row of `joined` for every token that is joined.
        """
        n = len(self._run_of_node)
        sizes = [len(run.ids) for run in self._runs]
        for run, size in zip(reversed(self._runs), reversed(sizes), strict=True):
            if run.at.node >= 0:
                sizes[self._run_of_node[run.at.node]] += size  # by then all of its own are counted
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
            # What branches off late stands first, so that the descendants of every token are in one piece.
            for off in sorted(run.runs, key=lambda off: -off.at.node):
                own = self._run_of_node[off.first]
                starts[own] = end
                end += sizes[own]
                ends[begin : begin + off.at.node - run.first + 1] = end
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
        """The nodes that lead from its fork to the ends that a cursor is behind of."""
        last = dict[int, int]()  # of each run the last node that is among them
        pieces, stack = [np.empty(0, dtype=np.int32)], list(cursor.ends)
        while stack:
            node = stack.pop()
            if node < 0 or node == cursor.node:
                continue
            own = self._run_of_node[node]
            run, known = self._runs[own], last.get(own)
            if known is not None and known >= node:
                continue
            inside = run.first <= cursor.node < node  # the fork stands in the same run
            first = cursor.node + 1 if inside else run.first
            pieces.append(np.arange(first if known is None else known + 1, node + 1, dtype=np.int32))
            last[own] = node
            if known is None and not inside:
                stack += [*run.at.ends, run.at.node]
        return np.concatenate(pieces)
