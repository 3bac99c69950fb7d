"""Where the tokens of a joined prompt are cached: in which tree, behind which key; pure, and no cache in here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

from sgl_apr.layout import Layout


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


def resolve(layout: Layout, ids: Sequence[int], root: str | None, secret: bytes) -> Resolved:
    """Where the tokens of a prompt are cached. `root` is the tree of ordinary prompts.

    What is decoded behind a join has a tree of its own, named by all that it saw and by a secret: the same
    text read in a line has other keys and values, and no client can name the tree.
    """
    parts: list[Part] = []

    def walk(
        strand: Layout, at: int, where: tuple[str | None, Sequence[int]]
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
