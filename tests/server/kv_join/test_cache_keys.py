"""Layouts: which are valid, the position and visibility of every token, and where tokens are cached."""

from __future__ import annotations

import json
import random
from array import array

import pytest

from sgl_apr.server.kv_join.cache_keys import lookup_cost, resolve
from sgl_apr.trajectory.join_layout import (
    LayoutError,
    chain_length,
    commit_prompts,
    extend_layout,
    join_branches,
    layout_positions,
    parse_layout,
    token_count,
)
from tests.support.dense_mask import dense_mask

EXAMPLE = [12, [[5], [7, [[2], [3]], 1]], 3]  # the one of the module's docstring


def random_layout(rng: random.Random, depth: int = 3) -> list:
    sequence: list = [rng.randint(1, 4)]
    for _ in range(rng.randint(0, 2) if depth else 0):
        sequence.append([random_layout(rng, depth - 1) for _ in range(rng.randint(1, 3))])
        sequence.append(rng.randint(1, 3))
    return sequence


def test_the_example():
    assert parse_layout(json.dumps(EXAMPLE), 33) == EXAMPLE
    at = list(layout_positions(EXAMPLE))
    assert at[:12] == list(range(12))
    assert at[12:17] == list(range(12, 17)), "branch 1"
    assert at[17:24] == list(range(12, 19)), "branch 2 begins where branch 1 does"
    assert (at[24:26], at[26:29], at[29]) == ([19, 20], [19, 20, 21], 22)
    assert at[30:] == [23, 24, 25], "after the longest branch"
    sees = dense_mask(EXAMPLE)
    assert not any(sees[17][12:17]), "branch 2 does not see branch 1"
    assert not any(sees[26][24:26])
    assert all(sees[29][17:30])
    assert not any(sees[29][12:17])
    assert all(sees[30][:31]), "what follows sees all"


def test_a_position_is_the_length_of_the_longest_chain():
    """By brute force: the longest path through the direct predecessors of a token."""
    rng = random.Random(1)
    for _ in range(100):
        layout = random_layout(rng)
        sees, at = dense_mask(layout), list(layout_positions(layout))
        n = token_count(layout)
        chain = [0] * n
        for i in range(n):
            chain[i] = max((chain[j] + 1 for j in range(i) if sees[i][j]), default=0)
        assert chain == at


def test_segments_cover_the_prompt_exactly_once():
    rng, trees = random.Random(2), set()
    for _ in range(200):
        layout = random_layout(rng)
        if len(layout) < 2:
            continue
        ids = [rng.randrange(50) for _ in range(token_count(layout))]
        resolved = resolve(layout, ids, "lora", b"secret")
        keys = [(part, list(part.key(array("q", ids)))) for part in resolved.parts]
        flat = [token for part, key in keys for token in key[len(key) - part.size :]]
        assert flat + ids[len(ids) - resolved.tail :] == ids
        assert sum(len(key) for _, key in keys) + resolved.tail <= lookup_cost(layout)
        assert resolved.offset == list(layout_positions(layout))[-1] - (len(ids) - 1)
        assert all(p.namespace == "lora" or p.namespace.startswith("apr:") for p in resolved.parts)
        trees.add((resolved.namespace, json.dumps([layout[:-1], ids[: len(ids) - resolved.tail]])))
    assert len({name for name, _ in trees}) == len(trees), "different prefixes have different trees"


def test_commits_come_after_the_commits_that_they_depend_on():
    rng = random.Random(3)
    for _ in range(200):
        layout = random_layout(rng)
        ids = [rng.randrange(50) for _ in range(token_count(layout))]
        cached: set[tuple] = set()  # (tree, key)

        def keep(prompt: list[int], own, cached=cached) -> None:
            resolved = resolve(own or [len(prompt)], prompt, None, b"secret")
            assert all((p.namespace, tuple(p.key(array("q", prompt)))) in cached for p in resolved.parts)
            tail = prompt[len(prompt) - resolved.tail :]
            cached.update((resolved.namespace, tuple(tail[:k])) for k in range(1, len(tail) + 1))

        for ranges, own in commit_prompts(layout):
            prompt = [i for first, last in ranges for i in ids[first:last]]
            assert own is None or token_count(own) == len(prompt)
            keep(prompt, own)
        if len(layout) > 1:
            keep(ids, layout)


def test_a_join_of_what_was_joined():
    """The example, step by step: the second branch joins its own two branches first."""
    inner = join_branches((), 12 + 7, [((), 12 + 7 + 2), ((), 12 + 7 + 3)])
    assert inner == (19, ((2,), (3,)))
    assert extend_layout(inner, 25) == (19, ((2,), (3,)), 1)
    outer = join_branches((), 12, [((), 12 + 5), (inner, 25)])
    assert json.dumps(extend_layout(outer, 33)) == json.dumps(EXAMPLE)
    assert extend_layout((), 33) is None
    again = join_branches(outer, 33, [(outer, 33 + 4), (outer, 33 + 2)])
    assert extend_layout(again, 40) == (*outer, 3, ((4,), (2,)), 1)
    assert join_branches(outer, 33, [((), 37), (outer, 35)]) is None, "one has forgotten what was joined"
    assert chain_length(EXAMPLE) == 26


def test_a_tree_is_named_by_the_secret():
    ids = list(range(token_count(EXAMPLE)))
    one, other = (resolve(EXAMPLE, ids, None, secret).namespace for secret in (b"a", b"b"))
    assert one != other


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense", "expected a layout as JSON"),
        ("[" * 100_000, "expected a layout as JSON"),
        ("null", "expected a list"),
        ("[33]", "expected a block"),
        ("[12, [[5], [16]]]", "one token after"),
        ("[12, [[5], [16]], 0]", "one token after"),
        ("[12, [[5], [15]], 3]", "has 35 tokens, expected the 33"),
        ("[12, [], 21]", "a branch in every block"),
        ("[12, [5], 16]", "expected a list"),
        ('[12, [["5"]], 21]', "found '5'"),
        ("[12, [[true]], 20]", "found True"),
        ("[-1, [[5]], 29]", "found -1"),
        ("[1e9, [[5]], 29]", "found 1000000000.0"),
        ("[99999999999999999999, [[5]], 29]", "found 9999"),
        ("[1, " + "[[0, " * 20 + "1" + "]]" * 20 + ", 31]", "nested at most 16"),
        ("[1, [" + ",".join(["[0]"] * 10_000) + "], 32]", "at most 4096"),
    ],
)
def test_what_is_no_layout(text: str, message: str):
    with pytest.raises(LayoutError, match=message):
        parse_layout(text, 33)
