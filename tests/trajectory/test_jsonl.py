"""JSON Lines: what the reader accepts and rejects, and how the appender continues an interrupted file."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import sgl_apr as apr
from sgl_apr.trajectory.jsonl import count_lines, open_for_append, parse_lines, read_lines


def test_lines_have_numbers_and_blank_lines_are_skipped(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n\n  \n{"ü": "\u2028"}')
    assert list(read_lines(path)) == [(1, {"a": 1}), (4, {"ü": "\u2028"})]
    assert list(read_lines(str(path), allow_partial=True)) == [(1, {"a": 1})]


@pytest.mark.parametrize("partial", [b'{"a', '{"ü"}'.encode()[:3], b'{"a": 1}'])
def test_a_partial_last_line_can_be_skipped(tmp_path: Path, partial: bytes):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n' + partial)
    assert list(read_lines(path, allow_partial=True)) == [(1, {"a": 1})]
    assert count_lines(path) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1]", "expected a JSON object, found list"),
        ("null", "expected a JSON object, found NoneType"),
        ('{"a', "expected a JSON object, found no JSON: "),
        ("[" * 100_000, "expected a JSON object, found no JSON: "),
        ("\udcff", "expected a JSON object, found no JSON: "),
    ],
)
def test_another_line_is_named(tmp_path: Path, line: str, message: str):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"a": 1}}\n{line}\n{{"a": 2}}\n', errors="surrogateescape")
    with pytest.raises(apr.AprError, match=f"a.jsonl, line 2: {message}"):
        list(read_lines(path, allow_partial=True))


def test_lines_without_a_file():
    assert list(parse_lines(['{"a": 1}\n', b'{"b": 2}'], "stdin")) == [(1, {"a": 1}), (2, {"b": 2})]
    with pytest.raises(apr.AprError, match="stdin, line 1: expected a JSON object"):
        list(parse_lines(["x"], "stdin"))
    with pytest.raises(apr.AprError, match="stdin, line 1: expected a problem, found list"):
        list(parse_lines(["[]"], "stdin", expected="a problem"))


def test_a_file_that_cannot_be_read(tmp_path: Path):
    with pytest.raises(apr.AprError, match=r"cannot read .*none\.jsonl: No such file"):
        list(read_lines(tmp_path / "none.jsonl"))
    with pytest.raises(apr.AprError, match=r"cannot read .*: Is a directory"):
        list(read_lines(tmp_path))
    with pytest.raises(apr.AprError, match="cannot read"):
        count_lines(tmp_path / "none.jsonl")


def test_an_appender_removes_a_partial_line_and_excludes_others(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n{"half')
    with open_for_append(path) as file:
        os.write(file, json.dumps({"b": 2}).encode() + b"\n")
        with pytest.raises(apr.AprError, match="another run writes to"), open_for_append(path):
            pass
    assert list(read_lines(path)) == [(1, {"a": 1}), (2, {"b": 2})]
