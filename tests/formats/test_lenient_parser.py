"""Lenient parsing: every defect has a name and a position, nothing raises, nothing is lost, and time is linear."""

from __future__ import annotations

import random
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sgl_apr as apr
from sgl_apr.formats.lenient_parser import read
from tests.support.example_documents import BRANCHES, DOCUMENTS
from tests.support.threadweaver_traces import TRACE, traces

every = pytest.mark.parametrize("name", apr.dialect_names())


def all_text(reading: apr.Reading) -> str:
    return "".join(s.text for s in reading.trajectory.spans)


def pieces(name: str, text: str) -> list[str]:
    """A document split at its tags, tags included."""
    marks = sorted(map(re.escape, apr.dialect(name).grammar.tag_literals), key=len, reverse=True)
    return [p for p in re.split(f"({'|'.join(marks)})", text) if p]


@every
def test_a_valid_document_has_no_defects(name: str):
    reading = read(DOCUMENTS[name], name)
    assert reading.is_valid
    assert reading.trajectory == apr.dialect(name).parse(DOCUMENTS[name])
    assert [len(b.branches) for b in reading.trajectory.blocks] == BRANCHES[name]


@every
def test_detect_names_the_dialect(name: str):
    assert apr.detect(DOCUMENTS[name]) == name
    assert read(DOCUMENTS[name]).trajectory.dialect == name


def test_text_without_tags_is_of_no_dialect():
    assert apr.detect("x < y and <b>bold</b>") is None
    assert read("x < y and <b>bold</b>").is_valid


SEEDED = [
    ("threadweaver", "\n</Thread><Thread>", "\n<Thread>", "unclosed branch"),
    ("threadweaver", "2: BB", " BB", "missing number"),
    ("threadweaver", "<Outline>2: and", "<Outline>: and", "missing number"),
    ("threadweaver", "2: and", "1: and", "duplicate number"),
    ("threadweaver", "2: BB", "1: BB", "duplicate number"),
    ("threadweaver", "2: and", "3: and", "missing number"),
    ("threadweaver", "BB\n", "BB <Conclusion>no</Conclusion>\n", "conclusion inside a branch"),
    ("threadweaver", "\n</Parallel>\n\nThe", "\n\n\nThe", "block never closed"),
    ("threadweaver", "Let me", "Let </Thread> me", "unopened branch"),
    ("threadweaver", "</Thread><Thread>", "</Thread> so <Thread>", "text where none belongs"),
    ("threadweaver", "<Outline>2: and <b></Outline>\n", "", "branch without an outline"),
    ("threadweaver", "<Thread>\n2: BB\n</Thread>", "", "missing branch"),
    ("threadweaver", "1: x < y</Outline>", "1: x < y", "unclosed outline"),
    ("threadweaver", "BB", TRACE, "nested too deep"),
    ("threadweaver", "Let me", "Let <Outline> me", "tag in the wrong place"),
    ("multiverse", "1.2: r", "1.3: r", "missing number"),
    ("multiverse", "1.1: left", "1: left", "missing number"),
    ("multiverse", "1.2: r</Path>", "1.2: r", "unclosed branch"),
    ("multiverse", "</Conclusion>\n</Parallel>\nDone", "</Conclusion>\n\nDone", "block never closed"),
    ("npr", "</plan>\n</guideline>\n<step>\n1: 4", "</plan>\n<step>\n1: 4", "unclosed list of outlines"),
    ("npr", "2: 5\n</step>", "2: 5\n", "unclosed branch"),
    ("npr", "<step>\n2: 5\n</step>\n", "", "missing branch"),
    ("parallel_r1", "first view\n</Path>", "first view\n", "unclosed branch"),
    ("parallel_r1", "same\n</Summary>", "same\n", "block never closed"),
    ("apr", "Search 1 at level 1> Moving", "Search 2 at level 1> Moving", "missing number"),
    (
        "apr",
        "Search 1 at level 1 at Node #0,1",
        "Search 1 at level 1 at Node #0,2",
        "result of another branch",
    ),
    ("apr", "<End Sub Searches>\n", "", "block never closed"),
    ("spawn", "<Result>2:</Result>\n", "", "missing branch"),
    ("spawn", "4</Result>", "4", "unclosed result"),
    ("asyncthink", "<JOIN-2>6</JOIN-2>", "<JOIN-3>6</JOIN-3>", "join without a fork"),
    ("asyncthink", "<JOIN-1>4</JOIN-1> ", "", "block never closed"),
    ("pasta", "<async>Bread.</async>", "", "missing branch"),
    ("pasta", "Bread.</async>", "Bread.", "unclosed branch"),
    ("parathinker", "</think 2>", "</think 1>", "number of the closer"),
    ("parathinker", "<think 2>", "<think 3>", "missing number"),
]


@pytest.mark.parametrize(("name", "old", "new", "defect"), SEEDED)
def test_a_seeded_defect_is_named(name: str, old: str, new: str, defect: str):
    assert old in DOCUMENTS[name]
    text = DOCUMENTS[name].replace(old, new, 1)
    reading = read(text, name)
    assert defect in [d.name for d in reading.defects]
    assert all_text(reading) == text
    lines = text.split("\n")
    for d in reading.defects:
        assert len("\n".join(lines[: d.line - 1])) + (d.line > 1) + d.column - 1 == d.offset
        assert text.startswith(d.found, d.offset)


def test_the_text_around_a_defect_is_parsed():
    text = TRACE + TRACE.replace("\n</Thread><Thread>", "\n<Thread>") + TRACE
    reading = read(text)
    assert [d.name for d in reading.defects] == ["unclosed branch"]
    assert [[b.text for b in block.branches] for block in reading.trajectory.blocks] == [
        [" A\n", " BB\n"]
    ] * 3


def test_tags_in_the_prompt_are_not_structure():
    reading = read(TRACE, prompt="Write <Parallel> and </Thread>: ")
    assert reading.is_valid
    assert len(reading.trajectory.blocks) == 1
    assert reading.trajectory.text == TRACE
    assert reading.trajectory.prompt.startswith("Write <Parallel>")


def mutated(name: str, rng: random.Random) -> str:
    """A document with a few tags or characters deleted, swapped, duplicated or inserted."""
    parts = pieces(name, DOCUMENTS[name] * rng.randint(1, 2))
    marks = [m for other in (name, name, "multiverse") for m in apr.dialect(other).grammar.tag_literals]
    for _ in range(rng.randint(1, 4)):
        i = rng.randrange(len(parts))
        change = rng.randrange(5)
        if change == 0:
            del parts[i : i + rng.randint(1, 2)]
        elif change == 1:
            j = rng.randrange(len(parts))
            parts[i], parts[j] = parts[j], parts[i]
        elif change == 2:
            parts.insert(i, parts[i])
        elif change == 3:
            parts.insert(i, rng.choice([*marks, "\ud800", "<", "\x00", "7", "\n", " "]))
        else:
            at = rng.randrange(len(parts[i]) + 1)
            parts[i] = parts[i][:at] + parts[i][at + 1 :]
        parts = parts or [""]
    return "".join(parts)


def check(text: str, name: str | None) -> apr.Reading:
    reading = read(text, name)
    assert all_text(reading) == text
    assert reading.is_valid == apr.dialect(reading.trajectory.dialect).is_valid(text)
    for i, span in enumerate(reading.trajectory.spans):
        assert all(p < i for p in span.parents)
    assert apr.Trajectory.from_json(reading.trajectory.to_json()) == reading.trajectory
    return reading


@every
def test_mutated_documents_are_read(name: str):
    rng = random.Random(name)
    for _ in range(120):
        check(mutated(name, rng), name)


@pytest.mark.slow
@every
def test_ten_thousand_mutated_documents_are_read(name: str):
    rng = random.Random(7)
    for _ in range(10_000):
        check(mutated(name, rng), name)


@settings(max_examples=100, deadline=None)
@given(
    text=st.text(max_size=60)
    | st.lists(st.sampled_from([*apr.dialect("multiverse").tags, "1:", "\n", "x"])).map("".join)
)
def test_any_text_is_read(text: str):
    check(text, None)
    check(text, "multiverse")


@settings(max_examples=100, deadline=None)
@given(text=traces())
def test_valid_traces_are_clean(text: str):
    assert check(text, "threadweaver").is_valid


SIZE = 1 << 18
SMALL = (
    "<Parallel>\n<Outlines>\n<Outline>1: a</Outline>\n<Outline>2: b</Outline>\n</Outlines>\n"
    "<Thread>\n1: x</Thread><Thread>\n2: y</Thread>\n</Parallel>z"
)
LARGE = {
    "words": ("threadweaver", "word "),
    "angles": ("threadweaver", "<"),
    "openers": ("threadweaver", "<Thread>"),
    "closers": ("threadweaver", "</Thread>"),
    "wrong tags": ("threadweaver", "<Outline></Thread><Parallel>"),
    "nested": ("multiverse", "<Parallel>\n<Goal>\n<Outline>\n1: a</Outline>\n</Goal>\n<Path>\n1: a"),
    "small blocks": ("threadweaver", SMALL),
    "broken blocks": ("threadweaver", SMALL.replace("</Thread><", "<")),
    "traces": ("threadweaver", TRACE),
}


@pytest.mark.parametrize("case", LARGE)
def test_a_large_document_takes_linear_time(case: str):
    name, unit = LARGE[case]
    text = unit * (SIZE // len(unit))
    began = time.monotonic()
    reading = read(text, name)
    # It takes less than 1 s on an idle machine. Anything slower than linear would take minutes.
    assert time.monotonic() - began < 10
    assert all_text(reading) == text
