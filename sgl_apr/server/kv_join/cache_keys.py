"""Computes where the tokens of a joined prompt are cached: in which tree, under which key."""

from __future__ import annotations

import json
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

from sgl_apr.trajectory.join_layout import Layout, token_count

NAMESPACE_PREFIX = "apr:"  # begins the names of all trees of joined prompts

Ranges = tuple[tuple[int, int], ...]  # [first, last) of the flat prompt


@dataclass(frozen=True, slots=True)
class CachedSegment:
    """Tokens of a prompt whose keys and values are in the cache, in one tree.

    Attributes:
        namespace: The tree. None is the default tree of ordinary prompts.
        ranges: The ranges of the flat prompt that are the key of the segment: the tokens that lead to it, and its own.
        size: How many tokens at the end of the key are the segment's own.
    """

    namespace: str | None
    ranges: Ranges
    size: int

    def key(self, ids: array[int]) -> array[int]:
        """Return the key of the segment, from the ids of the prompt."""
        return slice_ranges(ids, self.ranges)


@dataclass(frozen=True, slots=True)
class ResolvedPrompt:
    """A prompt in segments, and the tokens after its last join.

    Attributes:
        parts: The segments before the end of the last join.
        namespace: The tree of the tokens after the last join.
        tail: How many tokens are after the last join.
        offset: The positions of these tokens minus their places in the flat prompt, 0 or less.
    """

    parts: tuple[CachedSegment, ...]
    namespace: str | None
    tail: int
    offset: int


def lookup_cost(layout: Layout, page_size: int = 1) -> int:
    """Return how many tokens are read to resolve a layout and to match its segments.

    The key of each segment contains all tokens before it in its tree. With pages of several tokens, the keys of the
    branches of the last block can contain all tokens before the block (`paged_keys`).
    """

    def walk(sequence: Layout, key: int) -> int:
        total = 0
        for item in sequence:
            if isinstance(item, int):
                key += item
                total += key
            else:
                total += key + sum(token_count(branch) + walk(branch, key) for branch in item)
                key = 0
        return total

    total = walk(layout, 0)
    if page_size > 1:
        last = max((k for k, item in enumerate(layout) if not isinstance(item, int)), default=None)
        block = () if last is None else layout[last]
        assert not isinstance(block, int)
        total += len(block) * token_count(layout[:last]) + sum(map(token_count, block))
    return total


def resolve(layout: Layout, ids: Sequence[int], root: str | None, secret: bytes) -> ResolvedPrompt:
    """Return where the tokens of a prompt are cached.

    Tokens after a join have a tree of their own, because the same text read as one sequence has other keys and values.
    The name of the tree is a keyed hash of all that the tokens attend to, so that no client can name it.

    Args:
        layout: The layout of the prompt. It ends with a number of tokens.
        ids: The prompt, flat.
        root: The tree of ordinary prompts.
        secret: The key of the hash.
    """
    ids = array("q", ids)
    parts: list[CachedSegment] = []

    def walk(sequence: Layout, at: int, namespace: str | None, key: Ranges) -> tuple[int, int, str | None]:
        """Return (end in the flat prompt, length of the longest chain, tree of what follows)."""
        chain = 0
        for item in sequence:
            start, longest = at, 0
            if isinstance(item, int):
                at += item
                key = append_range(key, start, at)
                if item:
                    parts.append(CachedSegment(namespace, key, item))
                chain += item
                continue
            for branch in item:
                at, length, _ = walk(branch, at, namespace, key)
                longest = max(longest, length)
            chain += longest
            namespace, key = (
                namespace_after_block(namespace, item, slice_ranges(ids, key), ids[start:at], secret),
                (),
            )
        return at, chain, namespace

    *before, tail = layout
    assert isinstance(tail, int), "`parse_layout` checks this"
    end, chain, namespace = walk(before, 0, root, ())
    return ResolvedPrompt(tuple(parts), namespace, tail, chain - end)


def append_range(ranges: Ranges, first: int, last: int) -> Ranges:
    if ranges and ranges[-1][1] == first:
        return (*ranges[:-1], (ranges[-1][0], last))
    return (*ranges, (first, last))


def slice_ranges(ids: array[int], ranges: Ranges) -> array[int]:
    first, *rest = ranges or ((0, 0),)
    selected = ids[slice(*first)]
    for bounds in rest:
        selected += ids[slice(*bounds)]
    return selected


def namespace_after_block(
    namespace: str | None, block: Sequence[Layout], key: array[int], branch_ids: array[int], secret: bytes
) -> str:
    """Name the tree after a block, by the tokens before its fork, its layout and the tokens of its branches."""
    seen = json.dumps([namespace, block, len(key)]).encode() + b"\0" + key.tobytes() + branch_ids.tobytes()
    return NAMESPACE_PREFIX + blake2b(seen, key=secret, digest_size=24).hexdigest()
