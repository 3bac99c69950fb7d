"""The layout of a joined prompt: which of its tokens were written side by side; pure, and no cache in here.

A prompt is a sequence: runs of tokens (how many) and blocks (one sequence for each branch), in the order of the
flat token ids. `[12, [[5], [7, [[2], [3]], 1]], 3]` is a prefix of 12 tokens, a block of two branches, of which
the second forked again, and 3 tokens behind the join. Branches begin at the same position and never see one
another; what follows a block begins behind its longest branch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from sgl_apr.errors import AprError

MAX_DEPTH, MAX_ITEMS = 16, 4096
LAYOUT_PARAM = "apr_layout"  # the custom parameter of a request that holds its layout, as JSON

Layout = Sequence["int | Sequence[Layout]"]


class LayoutError(AprError):
    """A layout that no prompt can have, or not this one."""


def parse_layout(text: str, tokens: int) -> Layout:
    """The layout of a prompt of so many tokens, from JSON; raises `LayoutError` that says what was expected."""
    try:
        sequence = json.loads(text)
    except (ValueError, RecursionError):
        raise LayoutError("the layout is no JSON") from None
    left = [MAX_ITEMS]

    def length(sequence: object, depth: int) -> int:
        if not isinstance(sequence, list) or depth > MAX_DEPTH:
            raise LayoutError(f"expected a list of runs and blocks, nested at most {MAX_DEPTH} deep")
        total = 0
        for item in sequence:
            left[0] -= 1
            if left[0] < 0:
                raise LayoutError(f"expected at most {MAX_ITEMS} runs, blocks and branches")
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

    if (total := length(sequence, 0)) != tokens:
        raise LayoutError(f"the layout has {total} tokens, expected the {tokens} of the prompt")
    if not sequence or type(sequence[-1]) is not int or sequence[-1] < 1 or len(sequence) < 2:
        raise LayoutError("expected a block, and at least one token behind the last one")
    return sequence  # type: ignore[no-any-return]  # as checked


def token_count(layout: Layout) -> int:
    """How many tokens it has."""
    return sum(i if isinstance(i, int) else sum(map(token_count, i)) for i in layout)


def chain_length(layout: Layout) -> int:
    """How many tokens its longest chain has: the position of what follows it."""
    return sum(i if isinstance(i, int) else max(map(chain_length, i)) for i in layout)


def extend_layout(joined: Layout, tokens: int) -> Layout | None:
    """The layout of a prompt of so many tokens of which the first are `joined`; None where nothing is."""
    return (*joined, tokens - token_count(joined)) if joined else None


def join_branches(before: Layout, fork: int, branches: Sequence[tuple[Layout, int]]) -> Layout | None:
    """What is joined behind a fork at token `fork` of a prompt that has joined `before` it.

    Each branch has the layout of its own joins, from the beginning of the prompt, and the tokens of its
    prompt. None if it has not kept what was joined before the fork.
    """
    sequences: list[Layout] = []
    run = fork - token_count(before)
    for joined, tokens in branches:
        if tuple(joined[: len(before)]) != tuple(before):
            return None
        own = extend_layout(joined, tokens) or (tokens,)
        first, *rest = own[len(before) :]
        if not isinstance(first, int) or first < run:
            return None
        sequences.append((first - run, *rest))
    return (*before, run, tuple(sequences))


def layout_positions(layout: Layout) -> Iterator[int]:
    """The position of every token of a prompt: the length of its longest causal chain."""

    def walk(sequence: Layout, at: int) -> Iterator[int]:
        for item in sequence:
            if isinstance(item, int):
                yield from range(at, at + item)
                at += item
            else:
                for branch in item:
                    yield from walk(branch, at)
                at += max(map(chain_length, item))

    return walk(layout, 0)


def masked_ranges(layout: Layout) -> Iterator[tuple[tuple[int, int], ...]]:
    """For every token the ranges [first, last) of earlier tokens that it does not see: those of other branches.

    There is at most one range for each block that the token stands in, outer before inner, none for what
    stands in no block.
    """

    def walk(
        sequence: Layout, at: int, ranges: tuple[tuple[int, int], ...]
    ) -> Iterator[tuple[tuple[int, int], ...]]:
        for item in sequence:
            if isinstance(item, int):
                yield from [ranges] * item
                at += item
                continue
            begun = at
            for branch in item:
                yield from walk(branch, at, (*ranges, (begun, at)) if at > begun else ranges)
                at += token_count(branch)

    return walk(layout, 0, ())


def dense_mask(layout: Layout) -> list[list[bool]]:
    """For every token which tokens it sees, itself included, as a dense matrix: for checks, in O(n^2)."""
    hidden = list(masked_ranges(layout))
    return [
        [j <= i and not any(first <= j < last for first, last in ranges) for j in range(len(hidden))]
        for i, ranges in enumerate(hidden)
    ]


def commit_prompts(layout: Layout) -> Iterator[tuple[list[tuple[int, int]], Layout | None]]:
    """The prompts that bring all branches of a prompt into a cache, in an order in which each finds its own.

    Each is given as ranges [first, last) of the whole prompt, and the layout that it has.
    """

    def walk(
        sequence: Layout, at: int, ranges: list[tuple[int, int]], before: list[int | Sequence[Layout]]
    ) -> Iterator[tuple[list[tuple[int, int]], Layout | None]]:
        for item in sequence:
            begun = at
            if isinstance(item, int):
                at += item
            else:
                for branch in item:
                    yield from walk(branch, at, ranges, before)
                    end = at + token_count(branch)
                    if end > at:
                        own = _merged([*before, *branch])
                        yield [*ranges, (at, end)], own if len(own) > 1 else None
                    at = end
            ranges, before = [*ranges, (begun, at)], [*before, item]

    return walk(layout, 0, [], [])


def _merged(layout: Sequence[int | Sequence[Layout]]) -> Layout:
    """The same without runs that follow one another."""
    merged: list[int | Sequence[Layout]] = []
    for item in layout:
        if isinstance(item, int) and merged and isinstance(last := merged[-1], int):
            merged[-1] = last + item
        else:
            merged.append(item)
    return merged
