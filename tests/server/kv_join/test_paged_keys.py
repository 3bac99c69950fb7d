"""Where the tokens of a joined prompt are cached if pages have several tokens."""

from __future__ import annotations

import random
from array import array

import pytest

from sgl_apr.server.kv_join.cache_keys import lookup_cost
from sgl_apr.server.kv_join.paged_keys import FILLER_ID, PagedPrompt, RowSlice, fill_page, resolve_pages
from sgl_apr.trajectory.join_layout import commit_prompts, layout_positions, token_count
from tests.server.kv_join.test_cache_keys import EXAMPLE, random_layout

PAGE_SIZES = [2, 3, 16]


def resolved(layout: list, ids: list[int], page_size: int) -> PagedPrompt:
    return resolve_pages(layout, ids, "lora", b"secret", page_size)


def test_the_example():
    """Pages of 8: the first branch ends at token 17, so its first two pages are shared."""
    ids = list(range(33))
    prompt = resolved(EXAMPLE, ids, 8)
    assert (prompt.fork, prompt.shared, prompt.joined.tokens) == (12, 16, 30)
    first, second = prompt.branches
    assert first.trees == (("lora", 0),)
    assert [row.tokens for row in prompt.branches] == [17, 12 + 7 + 2 + 3 + 1]
    inner, begin = second.trees[-1]
    assert (begin, str(inner)[:4]) == (16, "apr:"), "12 + 7 + 2 tokens, of which two pages are complete"
    assert list(second.ids(array("q", ids), 10, 14)) == [10, 11, 17, 18]
    assert [(p.row, p.first, p.last) for p in prompt.slices_from(16)] == [
        (first, 16, 17),
        (second, 12, 25),
    ]
    assert [(p.row, p.first, p.last) for p in prompt.slices_from(24)] == [(second, 19, 25)]
    assert list(prompt.slices_from(30)) == []
    assert prompt.offset == list(layout_positions(EXAMPLE))[-1] - 32


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_the_copies_are_the_tokens_that_are_not_shared(page_size: int):
    rng, trees = random.Random(2), set()
    for _ in range(60):
        layout = random_layout(rng)
        if len(layout) < 2:
            continue
        ids = [rng.randrange(50) for _ in range(token_count(layout))]
        prompt, flat = resolved(layout, ids, page_size), array("q", ids)
        end = len(ids) - layout[-1]
        assert prompt.joined.tokens == end
        assert prompt.shared % page_size == 0
        assert list(prompt.branches[0].ids(flat, 0, prompt.shared)) == ids[: prompt.shared]
        for first in range(prompt.shared, end + 1, page_size):
            copied = [t for p in prompt.slices_from(first) for t in p.row.ids(flat, p.first, p.last)]
            assert copied == ids[first:end]
        assert prompt.offset == list(layout_positions(layout))[-1] - (len(ids) - 1)
        for row in (*prompt.branches, prompt.joined):
            parts = list(row.parts())
            assert [p.first for p in parts[1:]] == [p.last for p in parts[:-1]]
            assert (parts[0].first, parts[-1].last) == (0, row.tokens)
            assert all(p.first % page_size == 0 for p in parts)
        cost = sum(p.last - p.first for row in prompt.branches for p in row.parts())
        assert cost + end <= lookup_cost(layout, page_size) + len(ids)
        trees.add((prompt.namespace, str([layout[:-1], ids[:end]])))
    assert len({name for name, _ in trees}) == len(trees), "different prefixes have different trees"


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_what_a_join_copies_was_committed(page_size: int):
    """Every page that a request shares or copies from is in its tree, with the tokens of the row that it is in."""
    rng = random.Random(3)
    for _ in range(60):
        layout = random_layout(rng)
        ids = [rng.randrange(50) for _ in range(token_count(layout))]
        cached: set[tuple] = set()  # (tree, key), for every number of complete pages

        def insert(namespace: str | None, key: array, cached=cached) -> None:
            ends = range(page_size, len(key) + 1, page_size)
            cached.update((namespace, tuple(key[:end])) for end in ends)

        def compute(prompt: list[int], own, commit: bool, cached=cached, insert=insert) -> None:
            flat = array("q", prompt)
            if own is None:
                insert("lora", fill_page(flat, page_size) if commit else flat)
                return
            pages = resolved(own, prompt, page_size)
            needed = [RowSlice(pages.branches[0], 0, pages.shared), *pages.slices_from(pages.shared)]
            for piece in needed:
                for part in piece.row.parts(None if piece.last % page_size else piece.last):
                    key = fill_page(piece.row.ids(flat, part.first, part.last), page_size)
                    assert part.last <= piece.first or (part.namespace, tuple(key)) in cached
            own_key = flat[pages.shared :]
            insert(pages.namespace, fill_page(own_key, page_size) if commit else own_key)

        for ranges, own in commit_prompts(layout):
            compute([i for first, last in ranges for i in ids[first:last]], own, True)
        if len(layout) > 1:
            compute(ids, layout, False)


def test_a_page_is_filled_with_an_id_that_no_vocabulary_has():
    assert list(fill_page(array("q", [1, 2, 3]), 4)) == [1, 2, 3, FILLER_ID]
    assert list(fill_page(array("q", [1, 2, 3, 4]), 4)) == [1, 2, 3, 4]
    assert FILLER_ID == 2**31 - 1
