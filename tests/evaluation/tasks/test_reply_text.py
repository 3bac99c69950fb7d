"""Readers of a reply: what they find, that it is what the expressions of the papers find, and that they take linear time."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sgl_apr.evaluation.benchmarks.gym import GymTask
from sgl_apr.evaluation.tasks.question import QuestionTask
from sgl_apr.evaluation.tasks.reply_text import (
    answer_lines,
    last_between,
    last_number_after,
    numbered_points,
)
from sgl_apr.methods.task import CollaborativeTask

# Simple, and up to cubic: what the readers have to agree with.
ANSWER = re.compile(r"^[^\w\n]*answer[^\w\n]*:[ *]*(\w.*?)[ *.]*$", re.IGNORECASE | re.MULTILINE)
SCORE = re.compile(r"score\D*(\d+)", re.IGNORECASE)
TAGS = re.compile(r"<answer>\s*(.*?)\s*</answer>", re.DOTALL)
END = re.compile(r"[.?!\u2026]\s*\n\n\s*$")
LONG = 100_000


def text_of(*pieces: str) -> st.SearchStrategy[str]:
    return st.lists(st.sampled_from(pieces), max_size=12).map("".join)


@given(text_of("Answer:", "**", "answer", " ", "x", "7", ".", "\n", "-", ": "))
def test_answer_lines_are_those_of_the_expression(text: str):
    alone = [line for line in text.split("\n") if ANSWER.fullmatch(line)]
    expected = [ANSWER.findall(line)[0] for line in alone]
    found = answer_lines("\n\n".join(alone))
    assert found == expected


@given(text_of("score", "Score", "s", " ", "1", "23", "\n", "x"))
def test_scores_are_those_of_the_expression(text: str):
    found = SCORE.findall(text)
    assert last_number_after("score", text) == (int(found[-1][:9]) if found else None)


@given(text_of("<answer>", "</answer>", " ", "x", "\n", "<"))
def test_tagged_answers_are_those_of_the_expression(text: str):
    found = TAGS.findall(text)
    assert last_between("<answer>", "</answer>", text) == (found[-1] if found else None)


@given(text_of(".", "x", "\n", " ", "?"))
def test_a_step_ends_where_the_expression_says(text: str):
    assert CollaborativeTask.is_step_complete(None, text) == bool(END.search(text))


@pytest.mark.parametrize(
    ("text", "points"),
    [
        ("1. a\n 2) b ", [("1", "a"), ("2", "b")]),
        ("1.\n\nnext\n3. c", [("1", "next"), ("3", "c")]),
        ("1.", []),
        ("a 1. b", []),
    ],
)
def test_points(text: str, points: list[tuple[str, str]]):
    assert numbered_points(text) == points


def test_points_stop_at_a_gap_and_at_no_number_of_any_length():
    assert QuestionTask.points(None, f" a\n02. b\n{'9' * 5000}. c\n3. d") == ["a", "b"]


def test_an_answer_on_the_next_line():
    assert answer_lines("Answer:\n\n **42**.\nrest") == ["42"]
    assert answer_lines("Answer: ...") == ["."]
    assert answer_lines("Answer:\n***\n") == []


@pytest.mark.parametrize(
    "text",
    [
        "\n" * LONG,
        "answer:" + "\n" * LONG,
        "answer:\n" * (LONG // 8),
        "answer: a" + "*" * LONG + "b",
        "1." + "\n" * LONG,
        "1. a" + " " * LONG + "b",
        "score" * (LONG // 5),
        "choice 1" * (LONG // 8),
        "<answer>" + " " * LONG,
        "<answer>" * (LONG // 8),
        ".\n\n" * (LONG // 3) + "x",
        "7" * LONG,
    ],
    ids=lambda text: repr(text[:9]),
)
def test_strange_replies_take_linear_time(text: str):
    began = time.process_time()
    for read in (answer_lines, numbered_points, lambda t: last_number_after("score", t)):
        read(text)
    GymTask.answer(None, text)
    CollaborativeTask.is_step_complete(None, text)
    assert time.process_time() - began < 1
