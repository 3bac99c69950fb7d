"""Computes where the tokens of a joined prompt are cached if pages have several tokens.

The slots of a request are a row of complete pages, of which only the last one may be filled in part: attention kernels
find the slot of token `i` in page `i // page_size` of the row. The radix tree stores complete pages only. So branches
can rarely share the pages of a row, and a join copies them (`copying_cache`):

- The row of a joined request begins like that of its first branch. The complete pages of this branch are shared.
- All later tokens of the prompt before the end of the join are copied to pages of the request, which then continues in
  the last of them. No key is rotated: all branches begin at the same position, and have the same one in the joined
  prompt.
- The copied pages, and those that the request computes, enter a tree of their own, whose keys begin at the first page
  that is not shared. A later request of the same trajectory finds the copies there and shares them.

A branch rarely ends at the end of a page. Its last page would not be in the tree, and nothing could compute its tokens
again in a joined request, where they would see the other branches. So a commit, which is a request that decodes
nothing, enters its last page with a key that is filled up with `FILLER_ID`. The filler is not computed. No request has
its slots, because no prompt has this id, and a join only copies the tokens before it.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from sgl_apr.server.kv_join.cache_keys import (
    Ranges,
    append_range,
    namespace_after_block,
    slice_ranges,
)
from sgl_apr.trajectory.join_layout import Layout

FILLER_ID = (1 << 31) - 1  # more than any vocabulary has; SGLang rejects it in a prompt


@dataclass(frozen=True, slots=True)
class TreePart:
    """Tokens `first` to `last` of a row, which are in one tree, whose keys begin at token `first`."""

    namespace: str | None
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class PagedRow:
    """The tokens of one request, and the trees of their pages.

    Attributes:
        ranges: The tokens, as ranges of the flat prompt.
        trees: (the tree, the place of its first token in the row) in turn. Places are multiples of the page size. None
            is the tree of ordinary prompts.
    """

    ranges: Ranges
    trees: tuple[tuple[str | None, int], ...]

    @property
    def tokens(self) -> int:
        return sum(last - first for first, last in self.ranges)

    def ids(self, ids: array[int], first: int, last: int) -> array[int]:
        """Return the ids of tokens `first` to `last` of the row, from those of the flat prompt."""
        selected, place = array("q"), 0
        for begin, end in self.ranges:
            low, high = max(first - place, 0), min(last - place, end - begin)
            if low < high:
                selected += ids[begin + low : begin + high]
            place += end - begin
        return selected

    def parts(self, end: int | None = None) -> Iterator[TreePart]:
        """Yield the parts of the row, or of its first `end` tokens."""
        end = self.tokens if end is None else end
        lasts = [*(first for _, first in self.trees[1:]), end]
        for (namespace, first), last in zip(self.trees, lasts, strict=True):
            if first < min(last, end):
                yield TreePart(namespace, first, min(last, end))


@dataclass(frozen=True, slots=True)
class RowSlice:
    """Tokens `first` to `last` of a row."""

    row: PagedRow
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class PagedPrompt:
    """A joined prompt whose pages have several tokens.

    Attributes:
        fork: Where the branches of the last block begin, in their rows and in the flat prompt.
        branches: The rows of the branches of the last block.
        joined: The row up to the end of the last block.
        offset: The positions of the tokens after it minus their places in the flat prompt, 0 or less.
    """

    fork: int
    branches: tuple[PagedRow, ...]
    joined: PagedRow
    offset: int

    @property
    def namespace(self) -> str:
        """The tree of the pages that are not shared with the first branch."""
        return str(self.joined.trees[-1][0])

    @property
    def shared(self) -> int:
        """How many tokens are in pages that are shared with the first branch."""
        return self.joined.trees[-1][1]

    def slices_from(self, first: int) -> Iterator[RowSlice]:
        """Yield in turn where tokens `first` and later ones of the joined row are in the rows of branches."""
        donor = next((row for row in self.branches if row.tokens > self.fork), self.branches[0])
        pieces = [RowSlice(donor, 0, self.fork)]
        pieces += [RowSlice(row, self.fork, row.tokens) for row in self.branches]
        end = 0
        for piece in pieces:
            end += piece.last - piece.first
            begin = max(piece.first, piece.last - max(0, end - first))
            if begin < piece.last:
                yield replace(piece, first=begin)


def resolve_pages(
    layout: Layout, ids: Sequence[int], root: str | None, secret: bytes, page_size: int
) -> PagedPrompt:
    """Return where the tokens of a joined prompt are cached.

    Args:
        layout: The layout of the prompt. It ends with a number of tokens.
        ids: The prompt, flat.
        root: The tree of ordinary prompts.
        secret: The key of the hash that names the trees (`cache_keys.resolve`).
        page_size: Tokens of a page.
    """
    ids = array("q", ids)

    def walk(
        sequence: Layout, at: int, row: PagedRow, namespace: str | None, key: Ranges
    ) -> tuple[int, int, PagedRow, int, tuple[PagedRow, ...]]:
        """Return (end in the flat prompt, longest chain, row, where the last block begins, the rows of its branches)."""
        chain, fork, branches = 0, 0, tuple[PagedRow, ...]()
        for item in sequence:
            start = at
            if isinstance(item, int):
                at += item
                row, key = (
                    replace(row, ranges=append_range(row.ranges, start, at)),
                    append_range(key, start, at),
                )
                chain += item
                continue
            longest, rows = 0, list[PagedRow]()
            for branch in item:
                at, length, branch_row, _, _ = walk(branch, at, row, namespace, key)
                longest = max(longest, length)
                rows.append(branch_row)
            chain, fork, branches = chain + longest, row.tokens, tuple(rows)
            namespace = namespace_after_block(namespace, item, slice_ranges(ids, key), ids[start:at], secret)
            key = ()
            shared = rows[0].tokens // page_size * page_size
            trees = tuple(tree for tree in rows[0].trees if tree[1] < shared)
            row = PagedRow(append_range(row.ranges, start, at), (*trees, (namespace, shared)))
        return at, chain, row, fork, branches

    *before, tail = layout
    assert isinstance(tail, int), "`parse_layout` checks this"
    end, chain, joined, fork, branches = walk(before, 0, PagedRow((), ((root, 0),)), root, ())
    return PagedPrompt(fork, branches, joined, chain - end)


def fill_page(ids: array[int], page_size: int) -> array[int]:
    """Return ids that are filled up to the end of a page."""
    return ids + array("q", [FILLER_ID]) * (-len(ids) % page_size)
