"""The layout of a joined prompt: which of its tokens belong to parallel branches.

A layout is a sequence of runs (a number of tokens) and blocks (one layout for each branch), in the order of the flat
token ids. `[12, [[5], [7, [[2], [3]], 1]], 3]` is a prefix of 12 tokens, a block of two branches, of which the second
forked again, and 3 tokens after the join. All branches of a block begin at the same position, and never see one
another. What follows a block begins after its longest branch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from sgl_apr.errors import AprError

MAX_DEPTH, MAX_ITEMS = 16, 4096
LAYOUT_PARAM = "apr_layout"  # the custom parameter of a request that holds its layout, as JSON

Layout = Sequence["int | Sequence[Layout]"]


class LayoutError(AprError):
    """A layout is malformed, or does not fit its prompt."""


def parse_layout(text: str, tokens: int) -> Layout:
    """Parse the layout of a prompt.

    Args:
        text: The layout as JSON.
        tokens: The number of tokens of the prompt.

    Raises:
        LayoutError: The layout is malformed or does not fit. The message says what was expected.
    """
    sequence, total = _parse_items(text, tokens)
    if total != tokens:
        raise LayoutError(f"the layout has {total} tokens, expected the {tokens} of the prompt")
    has_block = any(isinstance(item, list) for item in sequence)
    if not has_block or type(sequence[-1]) is not int or sequence[-1] < 1:
        raise LayoutError("expected a block, and at least one token after the last block")
    return sequence


def parse_prefix_layout(text: str, tokens: int) -> Layout:
    """Parse the layout of the beginning of a prompt, up to the end of its last join.

    Args:
        text: The layout as JSON. Empty if nothing is joined.
        tokens: The number of tokens of the prompt.

    Raises:
        LayoutError: The layout is malformed or does not fit.
    """
    if not text:
        return ()
    sequence, total = _parse_items(text, tokens)
    if total > tokens:
        raise LayoutError(f"the layout has {total} tokens, expected at most the {tokens} of the prompt")
    return freeze_layout(sequence)


def _parse_items(text: str, tokens: int) -> tuple[Layout, int]:
    """Parse a layout as JSON, and count its tokens. No run is longer than `tokens`."""
    try:
        sequence = json.loads(text)
    except (ValueError, TypeError, RecursionError):
        raise LayoutError("expected a layout as JSON") from None
    items_left = MAX_ITEMS

    def count_tokens(sequence: object, depth: int) -> int:
        nonlocal items_left
        if not isinstance(sequence, list) or depth > MAX_DEPTH:
            raise LayoutError(f"expected a list of runs and blocks, nested at most {MAX_DEPTH} deep")
        total = 0
        for item in sequence:
            items_left -= 1
            if items_left < 0:
                raise LayoutError(f"expected at most {MAX_ITEMS} runs, blocks and branches")
            if isinstance(item, list):
                if not item:
                    raise LayoutError("expected a branch in every block")
                items_left -= len(item)
                if items_left < 0:
                    raise LayoutError(f"expected at most {MAX_ITEMS} runs, blocks and branches")
                total += sum(count_tokens(branch, depth + 1) for branch in item)
            elif type(item) is int and 0 <= item <= tokens:
                total += item
            else:
                raise LayoutError(f"expected a run of 0 to {tokens} tokens, found {item!r:.40}")
        return total

    return sequence, count_tokens(sequence, 0)


def freeze_layout(layout: Layout) -> Layout:
    """Return a layout in which lists, as of JSON, are tuples."""
    return tuple(i if isinstance(i, int) else tuple(map(freeze_layout, i)) for i in layout)


def token_count(layout: Layout) -> int:
    """Return the number of tokens of a layout."""
    return sum(i if isinstance(i, int) else sum(map(token_count, i)) for i in layout)


def chain_length(layout: Layout) -> int:
    """Return the number of tokens of the longest causal chain, which is the position of what follows the layout."""
    return sum(i if isinstance(i, int) else max(map(chain_length, i)) for i in layout)


def extend_layout(joined: Layout, tokens: int) -> Layout | None:
    """Return the layout of a prompt that begins with a joined prompt.

    Args:
        joined: The layout of the beginning; empty if nothing is joined.
        tokens: The number of tokens of the complete prompt.

    Returns:
        The layout, or None if nothing is joined.

    Raises:
        LayoutError: The prompt is shorter than its beginning.
    """
    if not joined:
        return None
    if (rest := tokens - token_count(joined)) < 0:
        raise LayoutError(f"the prompt has {tokens} tokens, expected at least {tokens - rest}")
    return (*joined, rest)


def join_branches(before: Layout, fork: int, branches: Sequence[tuple[Layout, int]]) -> Layout | None:
    """Return the layout of a join.

    Args:
        before: What the prompt had joined before the fork.
        fork: The number of tokens of the prompt at the fork.
        branches: For each branch the layout of its own joins, from the beginning of the prompt, and the number of
            tokens of its prompt.

    Returns:
        The layout, or None if a branch has lost what was joined before the fork.
    """
    sequences: list[Layout] = []
    run = fork - token_count(before)
    for joined, tokens in branches:
        if tuple(joined[: len(before)]) != tuple(before) or tokens < token_count(joined):
            return None
        layout = extend_layout(joined, tokens) or (tokens,)
        first, *rest = layout[len(before) :]
        if not isinstance(first, int) or first < run:
            return None
        sequences.append((first - run, *rest))
    return (*before, run, tuple(sequences))


def layout_positions(layout: Layout) -> Iterator[int]:
    """Yield the position of every token: the length of its longest causal chain."""

    def visit(sequence: Layout, position: int) -> Iterator[int]:
        for item in sequence:
            if isinstance(item, int):
                yield from range(position, position + item)
                position += item
            else:
                for branch in item:
                    yield from visit(branch, position)
                position += max(map(chain_length, item))

    return visit(layout, 0)


def masked_ranges(layout: Layout) -> Iterator[tuple[tuple[int, int], ...]]:
    """Yield for every token the ranges [first, last) of earlier tokens that it does not see.

    These are the tokens of other branches. There is at most one range for each block that a token stands in, outer
    blocks first.
    """

    def visit(
        sequence: Layout, index: int, ranges: tuple[tuple[int, int], ...]
    ) -> Iterator[tuple[tuple[int, int], ...]]:
        for item in sequence:
            if isinstance(item, int):
                yield from [ranges] * item
                index += item
                continue
            start = index
            for branch in item:
                yield from visit(branch, index, (*ranges, (start, index)) if index > start else ranges)
                index += token_count(branch)

    return visit(layout, 0, ())


def commit_prompts(layout: Layout) -> Iterator[tuple[list[tuple[int, int]], Layout | None]]:
    """Yield the prompts that bring all branches of a prompt into a cache.

    In this order each prompt finds its own prefix in the cache.

    Yields:
        The ranges [first, last) of the whole prompt that make up the prompt, and the layout of the prompt; None if
        nothing in it is joined.
    """

    def visit(
        sequence: Layout, index: int, ranges: list[tuple[int, int]], before: list[int | Sequence[Layout]]
    ) -> Iterator[tuple[list[tuple[int, int]], Layout | None]]:
        for item in sequence:
            start = index
            if isinstance(item, int):
                index += item
            else:
                for branch in item:
                    yield from visit(branch, index, ranges, before)
                    end = index + token_count(branch)
                    if end > index:
                        prompt_layout = _merge_runs([*before, *branch])
                        yield [*ranges, (index, end)], prompt_layout if len(prompt_layout) > 1 else None
                    index = end
            ranges, before = [*ranges, (start, index)], [*before, item]

    return visit(layout, 0, [], [])


def _merge_runs(layout: Sequence[int | Sequence[Layout]]) -> Layout:
    """The same layout with adjacent runs merged."""
    merged: list[int | Sequence[Layout]] = []
    for item in layout:
        if isinstance(item, int) and merged and isinstance(last := merged[-1], int):
            merged[-1] = last + item
        else:
            merged.append(item)
    return merged
