"""The layout of a joined prompt: which of its tokens were written side by side; pure, and no cache in here.

A prompt is a strand: runs of tokens (how many) and blocks (one strand for each branch), in the order of the
flat token ids. `[12, [[5], [7, [[2], [3]], 1]], 3]` is a prefix of 12 tokens, a block of two branches, of which
the second forked again, and 3 tokens behind the join. Branches begin at the same position and never see one
another; what follows a block begins behind its longest branch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from sgl_apr.errors import AprError

MOST_DEPTH, MOST_ITEMS = 16, 4096

Strand = list["int | list[Strand]"]


class LayoutError(AprError):
    """A layout that no prompt can have, or not this one."""


@dataclass(frozen=True, slots=True)
class Part:
    """Tokens whose keys and values are in the cache: the last `size` of `key`, in the tree `namespace`."""

    namespace: str | None
    key: Sequence[int]
    size: int


@dataclass(frozen=True, slots=True)
class Resolved:
    """A prompt in parts, and what is left of it: `tail` tokens behind the last join, in the tree `namespace`.

    `offset` is what the positions of the tail lack to their places in the flat prompt (0 or less).
    """

    parts: tuple[Part, ...]
    namespace: str | None
    tail: int
    offset: int


def parse(text: str, tokens: int) -> Strand:
    """The layout of a prompt of so many tokens, from JSON; raises `LayoutError` that says what was expected."""
    try:
        strand = json.loads(text)
    except (ValueError, RecursionError):
        raise LayoutError("the layout is no JSON") from None
    left = [MOST_ITEMS]

    def length(strand: object, depth: int) -> int:
        if not isinstance(strand, list) or depth > MOST_DEPTH:
            raise LayoutError(f"expected a list of runs and blocks, nested at most {MOST_DEPTH} deep")
        total = 0
        for item in strand:
            left[0] -= 1
            if left[0] < 0:
                raise LayoutError(f"expected at most {MOST_ITEMS} runs, blocks and branches")
            if isinstance(item, list):
                if not item:
                    raise LayoutError("expected a branch in every block")
                left[0] -= len(item)
                total += sum(length(branch, depth + 1) for branch in item)
            elif type(item) is int and 0 <= item <= tokens:
                total += item
            else:
                raise LayoutError(f"expected a run of 0 to {tokens} tokens, found {item!r:.40}")
        return total

    if (total := length(strand, 0)) != tokens:
        raise LayoutError(f"the layout has {total} tokens, expected the {tokens} of the prompt")
    if not strand or type(strand[-1]) is not int or strand[-1] < 1 or len(strand) < 2:
        raise LayoutError("expected a block, and at least one token behind the last one")
    return strand  # type: ignore[no-any-return]  # as checked


def resolve(layout: Strand, ids: Sequence[int], root: str | None, secret: bytes) -> Resolved:
    """Where the tokens of a prompt are cached. `root` is the tree of ordinary prompts.

    What is decoded behind a join has a tree of its own, named by all that it saw and by a secret: the same
    text read in a line has other keys and values, and no client can name the tree.
    """
    parts: list[Part] = []

    def walk(
        strand: Strand, at: int, where: tuple[str | None, Sequence[int]]
    ) -> tuple[int, int, tuple[str | None, Sequence[int]]]:
        """(end in the flat prompt, length of the longest chain, tree and key behind it)."""
        chain = 0
        for item in strand:
            namespace, key = where
            if isinstance(item, int):
                where = (namespace, [*key, *ids[at : at + item]])
                if item:
                    parts.append(Part(*where, item))
                at, chain = at + item, chain + item
                continue
            begun, longest = at, 0
            for branch in item:
                at, length, _ = walk(branch, at, where)
                longest = max(longest, length)
            chain += longest
            seen = json.dumps([namespace, list(key), item, list(ids[begun:at])])
            where = ("apr:" + blake2b(seen.encode(), key=secret, digest_size=24).hexdigest(), [])
        return at, chain, where

    *before, tail = layout
    assert isinstance(tail, int), "checked when it was parsed"
    end, chain, (namespace, _) = walk(before, 0, (root, []))
    return Resolved(tuple(parts), namespace, tail, chain - end)


def positions(layout: Strand) -> Iterator[int]:
    """The position of every token of a prompt: the length of its longest causal chain."""

    def walk(strand: Strand, at: int) -> Iterator[int]:
        for item in strand:
            if isinstance(item, int):
                yield from range(at, at + item)
                at += item
            else:
                for branch in item:
                    yield from walk(branch, at)
                at += max(map(length, item))

    def length(strand: Strand) -> int:
        return sum(i if isinstance(i, int) else max(map(length, i)) for i in strand)

    return walk(layout, 0)


def visible(layout: Strand) -> list[list[bool]]:
    """For every token which tokens it sees, itself included: all before it but those of other branches."""
    paths: list[tuple[tuple[int, int], ...]] = []
    blocks = 0

    def walk(strand: Strand, path: tuple[tuple[int, int], ...]) -> None:
        nonlocal blocks
        for item in strand:
            if isinstance(item, int):
                paths.extend([path] * item)
                continue
            blocks += 1
            block = blocks
            for k, branch in enumerate(item):
                walk(branch, (*path, (block, k)))

    walk(layout, ())

    def apart(one: tuple[tuple[int, int], ...], other: tuple[tuple[int, int], ...]) -> bool:
        mine = dict(one)
        return any(block in mine and mine[block] != k for block, k in other)

    return [[j <= i and not apart(paths[i], paths[j]) for j in range(len(paths))] for i in range(len(paths))]
