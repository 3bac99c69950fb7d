"""JSON of trajectories: every wrong kind of value and every wrong reference is an error that names its place."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest

import sgl_apr as apr
from sgl_apr.trajectory.trajectory import SCHEMA
from tests.trajectory.test_dataset import FULL, SAMPLES


def changed(change: Callable[[dict[str, Any]], object]) -> str:
    """The JSON of the sample after a change."""
    data = json.loads(FULL.to_json())
    change(data)
    return json.dumps(data)


def put(*steps: str | int, value: Any) -> Callable[[dict[str, Any]], None]:
    """A change that replaces the value at the end of some steps."""

    def change(data: Any) -> None:
        for step in steps[:-1]:
            data = data[step]
        data[steps[-1]] = value

    return change


@pytest.mark.parametrize("sample", SAMPLES)
def test_what_was_written_is_read(sample: apr.Trajectory):
    assert apr.Trajectory.from_json(sample.to_json()) == sample
    assert json.loads(sample.to_json()) == json.loads(json.dumps({"schema": SCHEMA, **asdict(sample)}))
    assert apr.Trajectory.from_dict(json.loads(sample.to_json())) == sample


WRONG = [
    (("spans", 3, "token_ids"), [1.9], "spans[3].token_ids[0]: expected a whole number, found 1.9"),
    (("spans", 2, "token_ids"), [7, True], "spans[2].token_ids[1]: expected a whole number, found true"),
    (("spans", 2, "token_ids"), [-5], "spans[2].token_ids[0]: expected a token id, 0 or more, found -5"),
    (("spans", 2, "token_ids"), "7", "spans[2].token_ids: expected a list, found '7'"),
    (("spans", 1, "text"), None, "spans[1].text: expected text, found null"),
    (("spans", 1, "label"), 3, "spans[1].label: expected text, found 3"),
    (("spans", 1, "call"), 99, "spans[1].call: expected one of the 2 calls, from 0, found 99"),
    (("spans", 1, "call"), -1, "spans[1].call: expected one of the 2 calls, from 0, found -1"),
    (("spans", 1, "call"), "0", "spans[1].call: expected a whole number, found '0'"),
    (("spans", 1, "parents"), [1], "spans[1].parents[0]: expected a span before span 1, found 1"),
    (("spans", 1, "parents"), [0, -1], "spans[1].parents[1]: expected a span before span 1, found -1"),
    (("spans", 3, "waits_for"), [9], "spans[3].waits_for[0]: expected a span before span 3, found 9"),
    (("spans", 1, "parents"), None, "spans[1].parents: expected a list, found null"),
    (("spans", 1, "role"), "user", "spans[1].role: expected prompt or text or fork"),
    (("spans", 1, "role"), ["text"], "spans[1].role: expected prompt or text or fork"),
    (("spans", 1, "finish"), "done", "spans[1].finish: expected stop or eos"),
    (("spans", 1), [], "spans[1]: expected an object, found a list of 0"),
    (("spans", 1, "mood"), "good", "spans[1]: expected no field but call, finish"),
    (("spans", 2, "path"), [1], "spans[2].path: expected the path of a branch whose trunk comes before it"),
    (("spans", 2, "path"), [1, 2, 1, 1], "found [1, 2, 1, 1], a branch of [1, 2]"),
    (("spans", 2, "path"), [1, -2], "spans[2].path: expected numbers of blocks and branches"),
    (("spans",), {}, "spans: expected a list, found an object with 0 fields"),
    (("calls", 0, "started"), float("nan"), "calls[0].started: expected a finite number, found nan"),
    (("calls", 0, "ended"), float("inf"), "calls[0].ended: expected a finite number, found inf"),
    (("calls", 0, "ended"), 10**400, "calls[0].ended: expected a finite number, found a number of"),
    (("calls", 0, "prompt_tokens"), -1, "calls[0].prompt_tokens: expected 0 or more, found -1"),
    (("calls", 0, "logprobs"), [0.5, None], "calls[0].logprobs[1]: expected a finite number, found null"),
    (("calls", 0, "logprobs"), [0.5, True], "calls[0].logprobs[1]: expected a finite number, found true"),
    (("calls", 1, "path"), [1, "2"], "calls[1].path[1]: expected a whole number, found '2'"),
    (("limits", 0, "limit"), 4, "limits[0].limit: expected text, found 4"),
    (("decisions", 0, "step_s"), "fast", "decisions[0].step_s: expected a finite number, found 'fast'"),
    (("joins", 0, "by"), "magic", "joins[0].by: expected kv or text, found 'magic'"),
    (("joins", 0, "path"), [7], "joins[0].path: expected the path of a block or branch of the spans, found [7]"),
    (("joins", 1, "path"), [1, 9], "joins[1].path: expected the path of a block or branch of the spans"),
    (("dialect",), None, "dialect: expected text, found null"),
    (("dialect",), "x" * 200, None),
    (("wall_s",), "1", "wall_s: expected a finite number, found '1'"),
    (("seed",), 1.0, "seed: expected a whole number, found 1.0"),
    (("seeds_honoured",), 1, "seeds_honoured: expected true or false, found 1"),
    (("note",), "mine", "expected no field but calls, decisions, dialect"),
    (("schema",), "sgl_apr.trajectory/5", f"schema: expected '{SCHEMA}', which this version writes, found 'sgl_apr"),
    (("schema",), None, "schema: expected"),
]  # fmt: skip


@pytest.mark.parametrize(("steps", "value", "message"), WRONG)
def test_a_wrong_value_is_an_error_with_its_place(steps: tuple[Any, ...], value: Any, message: str | None):
    text = changed(put(*steps, value=value))
    if message is None:
        apr.Trajectory.from_json(text)
        return
    with pytest.raises(apr.TraceError) as raised:
        apr.Trajectory.from_json(text)
    assert message in str(raised.value)
    assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)
    assert pickle.loads(pickle.dumps(raised.value)).place == raised.value.place
    assert copy.copy(raised.value).expected == raised.value.expected


@pytest.mark.parametrize("name", ["spans", "dialect", "calls", "wall_s", "seed", "schema"])
def test_a_missing_field_is_named(name: str):
    with pytest.raises(apr.TraceError, match=f"{name}.*, found n"):
        apr.Trajectory.from_json(changed(lambda data: data.pop(name)))
    with pytest.raises(apr.TraceError, match=r"spans\[0\]: expected a field 'origin', found no such field"):
        apr.Trajectory.from_json(changed(lambda data: data["spans"][0].pop("origin")))


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "[" * 100_000, '{"a":' * 100_000, '{"schema": ' + "9" * 5000 + "}", "{", '"\ud800"', "NaN"]
)  # fmt: skip
def test_what_is_no_object_is_a_trace_error(text: str):
    with pytest.raises(apr.TraceError):
        apr.Trajectory.from_json(text)
    for value in (None, 3, b"\xff"):
        with pytest.raises(apr.TraceError):
            apr.Trajectory.from_json(value)


def test_whole_numbers_are_numbers():
    """JSON of other programs writes 2.0 as 2."""
    made = apr.Trajectory.from_json(changed(put("wall_s", value=2)))
    assert (made.wall_s, type(made.wall_s)) == (2.0, float)


def test_the_fields_of_the_parse_command_are_ignored():
    text = changed(lambda data: data.update(source="a.txt", valid=True, defects=[], metrics=None))
    assert apr.Trajectory.from_json(text) == FULL
