"""Layouts: what `parse_layout` accepts is safe for everything that reads it, and anything else is a `LayoutError`."""

from __future__ import annotations

import json
import random
import re
import time
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sgl_apr as apr
from sgl_apr.server.kv_join.cache_keys import lookup_cost, resolve
from sgl_apr.server.kv_join.validation import MAX_LAYOUT_CHARS, layout_of_request
from sgl_apr.trajectory.join_layout import (
    MAX_DEPTH,
    MAX_ITEMS,
    LayoutError,
    chain_length,
    commit_prompts,
    extend_layout,
    join_branches,
    layout_positions,
    masked_ranges,
    parse_layout,
    token_count,
)

sequences = st.recursive(
    st.lists(st.integers(0, 9), max_size=3),
    lambda branch: st.lists(st.integers(0, 9) | st.lists(branch, min_size=1, max_size=3), max_size=4),
    max_leaves=12,
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 40) | st.floats() | st.text(max_size=3) | st.just(10**400),
    lambda value: st.lists(value, max_size=4) | st.dictionaries(st.text(max_size=2), value, max_size=2),
    max_leaves=12,
)


def has_block(sequence: list[Any]) -> bool:
    return any(isinstance(item, list) for item in sequence)


def use(layout: Any, tokens: int) -> None:
    """What the scheduler and the runtime compute from a layout: no exception, and results that agree."""
    assert token_count(layout) == tokens
    assert has_block(layout)
    assert layout[-1] >= 1
    positions, masks = list(layout_positions(layout)), list(masked_ranges(layout))
    assert len(positions) == len(masks) == tokens
    assert max(positions) + 1 == chain_length(layout) <= tokens
    for place, (position, ranges) in enumerate(zip(positions, masks, strict=True)):
        hidden = sum(last - first for first, last in ranges)
        assert position <= place
        assert hidden <= place
        assert all(first < last <= place for first, last in ranges)
    resolved = resolve(layout, range(tokens), None, b"secret")
    assert sum(part.size for part in resolved.parts) + resolved.tail == tokens
    assert lookup_cost(layout) >= 0
    for ranges, prompt_layout in commit_prompts(layout):
        size = sum(last - first for first, last in ranges)
        if prompt_layout is not None:
            assert token_count(prompt_layout) == size


def check(text: Any, tokens: int) -> bool:
    """Parse a layout; whether it is accepted."""
    try:
        layout = parse_layout(text, tokens)
    except LayoutError as refused:
        message = str(refused)
    else:
        use(layout, tokens)
        return True
    assert 10 < len(message) < 200
    return False


@settings(max_examples=150, deadline=None)
@given(sequences)
def test_layouts_are_accepted_if_and_only_if_they_have_a_block_and_a_token_after_it(sequence: list[Any]):
    expected = has_block(sequence) and isinstance(sequence[-1], int) and sequence[-1] >= 1
    assert check(json.dumps(sequence), token_count(sequence)) is expected


@settings(max_examples=150, deadline=None)
@given(json_values, st.integers(0, 40))
def test_other_json_is_refused(value: Any, tokens: int):
    check(json.dumps(value), tokens)


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet='[]0123456789,-.e"{}tn \ud800\0', max_size=40), st.integers(0, 40))
def test_text_is_refused(text: str, tokens: int):
    check(text, tokens)


@pytest.mark.parametrize("layout", [[37], [0, 37], [36, 1], [1, 2, 34], [0, 0, 0, 37], [37, 0], []])
def test_a_layout_without_a_block_is_refused(layout: list[int]):
    with pytest.raises(
        LayoutError, match=r"expected a block, and at least one token after the last block|tokens"
    ):
        parse_layout(json.dumps(layout), 37)


HOSTILE = {
    "nested": "[" * 100_000,
    "nested and closed": "[" * 50_000 + "]" * 50_000,
    "too deep": "[" * (2 * MAX_DEPTH + 3) + "5" + "]" * (2 * MAX_DEPTH + 3),
    "number": f"[{'9' * 5000}, [[1]], 1]",
    "large number": f"[{'9' * 4000}, [[1]], 1]",
    "negative": "[-5, [[5]], 37]",
    "float": "[30.0, [[5]], 2]",
    "exponent": "[3e1, [[5]], 2]",
    "nan": "[NaN, [[5]], 2]",
    "truth": "[30, [[true]], 6]",
    "branches": f"[5, [{','.join(['[]'] * (MAX_ITEMS + 1))}], 32]",
    "runs": f"[{','.join(['0'] * MAX_ITEMS)}, [[5]], 32]",
    "object": '{"0": [[1]]}',
    "block of a number": "[5, [30], 2]",
    "empty block": "[35, [], 2]",
    "not a string": 37,
    "null": None,
    "surrogate": "\ud800",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_layouts_are_refused_in_time(name: str):
    started = time.process_time()
    assert not check(HOSTILE[name], 37)
    assert time.process_time() - started < 0.5


def test_the_limits_themselves_are_accepted():
    deep: list[Any] = [1]
    for _ in range(MAX_DEPTH - 1):
        deep = [[deep], 1]
    assert check(json.dumps([[deep], 1]), MAX_DEPTH + 1)
    wide = [0, [[] for _ in range(MAX_ITEMS - 3)], 1]
    assert check(json.dumps(wide), 1)


@settings(max_examples=100, deadline=None)
@given(sequences, st.lists(st.integers(0, 9), min_size=1, max_size=3), st.integers(0, 5))
def test_joins_have_layouts_that_are_accepted(sequence: list[Any], lengths: list[int], run: int):
    before = tuple(sequence) if has_block(sequence) and isinstance(sequence[-1], list) else ()
    fork = token_count(before) + run
    layout = join_branches(before, fork, [(before, fork + length) for length in lengths])
    assert layout is not None
    complete = extend_layout(layout, fork + sum(lengths) + 3)
    assert complete is not None
    assert check(json.dumps(complete), fork + sum(lengths) + 3)


def test_a_prompt_shorter_than_its_beginning_is_refused():
    with pytest.raises(LayoutError, match="the prompt has 3 tokens, expected at least 5"):
        extend_layout((1, ((4,),)), 3)


def request(layout: object, **fields: object) -> SimpleNamespace:
    sampling = SimpleNamespace(custom_params={"apr_layout": layout}, beam_width=None)
    return SimpleNamespace(sampling_params=sampling, **{"return_logprob": False, **fields})


@pytest.mark.parametrize(
    "layout",
    ["[0, 37]", "x" * (MAX_LAYOUT_CHARS + 1), 37, None, ["a"], "[" * 60_000, json.dumps([10**6, [[1]], 1])],
)
def test_requests_with_a_wrong_layout_are_refused(layout: object):
    with pytest.raises(LayoutError):
        layout_of_request(request(layout), 37)


def test_a_request_with_a_layout_is_accepted():
    assert layout_of_request(request("[20, [[6], [3]], 8]"), 37) == [20, [[6], [3]], 8]


@pytest.mark.slow
def test_thousands_of_mutated_layouts():
    rng = random.Random(0)
    slowest, accepted = 0.0, 0
    for _ in range(20_000):
        text = json.dumps(random_sequence(rng, 0))
        for _ in range(rng.choice((0, 0, 1, 2))):
            at = rng.randrange(len(text) + 1)
            text = text[:at] + rng.choice("[],0123456789 -.") + text[at + rng.choice((0, 1)) :]
        started = time.process_time()
        try:
            tokens = token_count(json.loads(text))
        except Exception:
            tokens = rng.randrange(40)
        accepted += check(text, min(tokens, 5000))
        slowest = max(slowest, time.process_time() - started)
    assert slowest < 2.0
    assert accepted > 500


def random_sequence(rng: random.Random, depth: int) -> list[Any]:
    items: list[Any] = []
    for _ in range(rng.randrange(1, 5)):
        is_block = rng.random() < 0.4 and depth < 4
        items.append(
            [random_sequence(rng, depth + 1) for _ in range(rng.randrange(1, 4))]
            if is_block
            else rng.randrange(9)
        )
    return [*items, rng.randrange(9)] if depth == 0 else items


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ("9" * 5000, "expected a layout as JSON"),
        ("[" * 5000, "expected a layout as JSON"),
        ("null", "expected a list of runs and blocks"),
        ("[1, [[2], [1]]]", "the layout has 4 tokens, expected at most the 3 of the prompt"),
        ("[4]", "expected a run of 0 to 3 tokens, found 4"),
    ],
)
def test_a_trajectory_with_a_wrong_layout_of_its_prompt_is_refused(layout: str, message: str) -> None:
    prompt = apr.Span("prompt", "prompt", "abc", (1, 2, 3), ())
    trajectory = apr.Trajectory((prompt,), "threadweaver", prompt_layout=layout)
    with pytest.raises(apr.TraceError, match=f"prompt_layout.*{re.escape(message)}"):
        apr.Trajectory.from_json(trajectory.to_json())
    with pytest.raises(apr.AprError, match=re.escape(message)):
        apr.causality(trajectory, "kv")


def test_the_layout_of_a_prompt_is_read() -> None:
    prompt = apr.Span("prompt", "prompt", "abc", (1, 2, 3), ())
    trajectory = apr.Trajectory((prompt,), "threadweaver", prompt_layout="[1, [[1], [1]]]")
    assert apr.Trajectory.from_json(trajectory.to_json()).joined_prefix == (1, ((1,), (1,)))
    assert apr.Trajectory((prompt,), "threadweaver").joined_prefix == ()
