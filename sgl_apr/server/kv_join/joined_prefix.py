"""The cached prefix of a joined request, in the place of a node of the radix tree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

PathSlice = tuple[Any, int, int]  # (node, first, last): tokens first to last of the path to a node


@dataclass(frozen=True, slots=True)
class JoinedPrefix:
    """The cached prefix of a joined request. It takes the place of a tree node.

    Attributes:
        parts: The slots that are shared with the trees before the last join, in turn.
        tail: The node in the tree `namespace`.
        namespace: The tree of what the request itself computes and copies.
        start: Where the tokens of this tree begin in the prompt.
        offset: The positions of the tokens after the last join minus their places in the prompt, 0 or less.
        sources: What the request has to copy after `parts` and `tail`. Empty with pages of one token.
        copies: [tokens of `sources`], the slots of the request that they are copied to. None if there is nothing to
            copy, or they are not allocated yet.
    """

    parts: tuple[PathSlice, ...]
    tail: Any
    namespace: str
    start: int
    offset: int
    sources: tuple[PathSlice, ...] = ()
    copies: Any = None  # a torch.Tensor; this module does not import torch

    @property
    def nodes(self) -> list[Any]:
        """The nodes that are locked together."""
        return [*(node for node, _, _ in (*self.parts, *self.sources)), self.tail]
