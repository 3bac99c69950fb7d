"""Where the tokens of a joined prompt are cached: in which tree, behind which key; pure, and no cache in here."""

from __future__ import annotations

import json
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

from sgl_apr.trajectory.join_layout import Layout, token_count

NAMESPACE_PREFIX = "apr:"  # how the names of all trees of joined prompts begin

Ranges = tuple[tuple[int, int], ...]  # [first, last) of the flat prompt


@dataclass(frozen=True, slots=True)
class CachedSegment:
    """Tokens whose keys and values are in the cache: the last `size` of the key, in the tree `namespace`."""

    namespace: str | None
    ranges: Ranges
    size: int

    def key(self, ids: array[int]) -> array[int]:
        """Of the ids of the prompt: those that lead to the part, and its own."""
        return _slice_ranges(ids, self.ranges)


@dataclass(frozen=True, slots=True)
class ResolvedPrompt:
    """A prompt in parts, and what is left of it: `tail` tokens behind the last join, in the tree `namespace`.

    `offset` is what the positions of the tail lack to their places in the flat prompt (0 or less).
    """

    parts: tuple[CachedSegment, ...]
    namespace: str | None
    tail: int
    offset: int


def lookup_cost(layout: Layout) -> int:
    """How many tokens are looked at to resolve a layout and to find its parts: each part has all before it as key."""

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

    return walk(layout, 0)


def resolve(layout: Layout, ids: Sequence[int], root: str | None, secret: bytes) -> ResolvedPrompt:
    """Where the tokens of a prompt are cached. `root` is the tree of ordinary prompts.

    What is decoded behind a join has a tree of its own, named by all that it saw and by a secret: the same
    text read in a line has other keys and values, and no client can name the tree.
    """
    ids = array("q", ids)
    parts: list[CachedSegment] = []

    def walk(sequence: Layout, at: int, namespace: str | None, key: Ranges) -> tuple[int, int, str | None]:
        """(end in the flat prompt, length of the longest chain, tree behind it)."""
        chain = 0
        for item in sequence:
            begun, longest = at, 0
            if isinstance(item, int):
                at += item
                key = _append_range(key, begun, at)
                if item:
                    parts.append(CachedSegment(namespace, key, item))
                chain += item
                continue
            for branch in item:
                at, length, _ = walk(branch, at, namespace, key)
                longest = max(longest, length)
            chain += longest
            namespace, key = (
                _namespace_after_block(namespace, item, _slice_ranges(ids, key), ids[begun:at], secret),
                (),
            )
        return at, chain, namespace

    *before, tail = layout
    assert isinstance(tail, int), "checked when it was parsed"
    end, chain, namespace = walk(before, 0, root, ())
    return ResolvedPrompt(tuple(parts), namespace, tail, chain - end)


def _append_range(ranges: Ranges, first: int, last: int) -> Ranges:
    if ranges and ranges[-1][1] == first:
        return (*ranges[:-1], (ranges[-1][0], last))
    return (*ranges, (first, last))


def _slice_ranges(ids: array[int], ranges: Ranges) -> array[int]:
    first, *rest = ranges or ((0, 0),)
    taken = ids[slice(*first)]
    for one in rest:
        taken += ids[slice(*one)]
    return taken


def _namespace_after_block(
    namespace: str | None, block: Sequence[Layout], key: array[int], written: array[int], secret: bytes
) -> str:
    """Of the tree behind a block, by where it was forked, how it was written and what."""
    seen = json.dumps([namespace, block, len(key)]).encode() + b"\0" + key.tobytes() + written.tobytes()
    return NAMESPACE_PREFIX + blake2b(seen, key=secret, digest_size=24).hexdigest()
