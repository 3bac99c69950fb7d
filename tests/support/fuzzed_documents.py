"""Texts, JSON and files that are almost right, and checks that only this package's errors come out of the readers."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sgl_apr as apr
from sgl_apr.formats.lenient_parser import read
from sgl_apr.runtime.event_json import event_from_json, event_to_json
from sgl_apr.runtime.events import Event
from tests.support.document_strategies import document
from tests.support.example_documents import DOCUMENTS
from tests.trajectory.test_dataset import FULL

ODD_CHARACTERS = (
    "\ud800",
    "\udfff",
    "\x00",
    "\u2028",
    "\x85",
    "\r",
    "\ufeff",
    "\U0001f600",
    "e\u0301",
    "\u202e",
    "\x1b",
)
NUMBERS = ("1", "2", "0", "1.1", "-1", "9" * 30, "0" * 400 + "1", "9" * 5000, "\u0661", "\u00b2", "1e9", "")
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**63, 10**40, 1.5, -0.0, 1e308, float("nan"), float("inf"), "", "x", "text", "\ud800", [],
    [0], [1.5], [[]], [None], {}, {"a": 1}, "9" * 5000, "stop", "kv", [1, 2], [-1],
)  # fmt: skip
TRAJECTORIES = [FULL, *(apr.dialect(name).parse(text) for name, text in DOCUMENTS.items())]


def fuzzed_text(rng: random.Random) -> tuple[str, str]:
    """A text and the dialect that it almost follows."""
    name = rng.choice(list(DOCUMENTS))
    dialect = apr.dialect(name)
    text = document(dialect, rng) if rng.random() < 0.3 else DOCUMENTS[name]
    marks = [*dialect.grammar.tag_literals, *apr.dialect(rng.choice(list(DOCUMENTS))).grammar.tag_literals]
    for _ in range(rng.randint(0, 6)):
        at = rng.randint(0, len(text))
        end = min(len(text), at + rng.choice((0, 0, 1, 3, 20)))
        piece = rng.choice(
            (
                rng.choice(marks),
                rng.choice(ODD_CHARACTERS),
                rng.choice(NUMBERS),
                text[at : at + 30],
                "",
                "<",
                ">",
                "\n",
            )
        )
        text = text[:at] + piece * rng.choice((1, 1, 1, 2, 40)) + text[end:]
    return text, name


def _value(rng: random.Random) -> Any:
    return copy.deepcopy(rng.choice(VALUES))


def fuzzed_json(rng: random.Random, data: Any, changes: int) -> Any:
    """Parsed JSON with some values, fields or items replaced, removed, repeated or added."""
    data = json.loads(json.dumps(data))
    for _ in range(changes):
        holder, key = data, None
        while isinstance(holder, (dict, list)) and holder:
            key = rng.choice([*holder]) if isinstance(holder, dict) else rng.randrange(len(holder))
            if rng.random() < 0.35 or not isinstance(holder[key], (dict, list)) or not holder[key]:
                break
            holder = holder[key]
        if not isinstance(holder, (dict, list)) or key is None:
            return _value(rng)
        change = rng.randrange(5)
        if change == 0:
            del holder[key]
        elif change == 1 and isinstance(holder, dict):
            holder[rng.choice(("x", "schema", "text", "path", "\ud800", str(key) + "s"))] = _value(rng)
        elif change == 1:
            holder.insert(key, copy.deepcopy(rng.choice((*VALUES, holder[key]))))
        elif change == 2 and isinstance(holder[key], int):
            holder[key] += rng.choice((-1, 1, 100, -(10**9)))
        else:
            holder[key] = _value(rng)
    return data


def fuzzed_characters(rng: random.Random, text: str) -> str:
    """A text, cut or with some characters changed."""
    for _ in range(rng.randint(0, 3)):
        at = rng.randint(0, len(text))
        piece = rng.choice(
            (
                '"',
                "{",
                "}",
                "[",
                "]",
                ",",
                ":",
                "\\",
                "\\ud800",
                "NaN",
                "-",
                "e",
                "9" * 5000,
                "[" * 3000,
                "\n",
            )
        )
        text = text[:at] + piece + text[at + rng.randint(0, 2) :]
    return text[: rng.randint(0, len(text))] if rng.random() < 0.2 else text


def check_text(rng: random.Random, folder: Path) -> None:
    """The lenient parser takes any text, the strict one raises `TraceError`, and conversions raise `ConversionError`."""
    text, name = fuzzed_text(rng)
    reading = read(text, rng.choice((name, None)))
    trajectory = reading.trajectory
    assert "".join(span.text for span in trajectory.spans) == text
    assert apr.Trajectory.from_json(trajectory.to_json()) == trajectory
    assert trajectory.to_json().encode()
    use(trajectory)
    for dialect in rng.sample(list(DOCUMENTS), 2):
        raised_by(lambda dialect=dialect: apr.convert(trajectory, dialect), apr.ConversionError)
    tokenizer = apr.ByteTokenizer(apr.dialect(name).tags)
    raised_by(lambda: apr.dialect(name).parse(text), apr.TraceError)
    error = raised_by(lambda: read(text, name, tokenizer=tokenizer).trajectory.metrics(), apr.AprError)
    assert (error is None) == (not any("\ud800" <= c <= "\udfff" for c in text))


def check_json(rng: random.Random, folder: Path) -> None:
    """`from_json` raises `TraceError` or returns a trajectory that works and is written as it was read."""
    data = json.loads(rng.choice(TRAJECTORIES).to_json())
    text = json.dumps(fuzzed_json(rng, data, rng.randint(0, 3)))
    if rng.random() < 0.3:
        text = fuzzed_characters(rng, text)
    made: list[apr.Trajectory] = []
    error = raised_by(lambda: made.append(apr.Trajectory.from_json(text)), apr.TraceError)
    if error is None:
        assert apr.Trajectory.from_json(made[0].to_json()) == made[0]
        use(made[0])
        raised_by(lambda: apr.convert(made[0], rng.choice(list(DOCUMENTS))), apr.ConversionError)


def check_file(rng: random.Random, folder: Path) -> None:
    """`read_many` names the line of what it cannot read."""
    lines = [{"id": f"p{k}", "trajectory": json.loads(rng.choice(TRAJECTORIES).to_json())} for k in range(2)]
    text = "".join(json.dumps(fuzzed_json(rng, line, rng.randint(0, 2))) + "\n" for line in lines)
    text = fuzzed_characters(rng, text) if rng.random() < 0.4 else text
    path = folder / "fuzzed.jsonl"
    path.write_bytes(text.encode(errors="surrogatepass"))
    error = raised_by(lambda: list(apr.read_many(path)), apr.AprError)
    assert error is None or f"{path}, line " in str(error)


def check_event(rng: random.Random, folder: Path) -> None:
    """`event_from_json` raises `TraceError`, and `rebuild` raises `AprError`."""
    sent = [fuzzed_json(rng, data, rng.choice((0, 0, 0, 1))) for data in EVENTS]
    if rng.random() < 0.5:
        del sent[rng.randrange(len(sent))]
    events: list[Event] = []
    for data in sent:
        raised_by(lambda data=data: events.append(event_from_json(data)), apr.TraceError)
    raised_by(lambda: use(apr.rebuild(events)), apr.AprError)


CHECKS: tuple[Callable[[random.Random, Path], None], ...] = (check_text, check_json, check_file, check_event)


def use(trajectory: apr.Trajectory) -> None:
    """Everything that is computed from a trajectory."""
    assert isinstance(trajectory.text + trajectory.answer + trajectory.prompt, str)
    assert isinstance(trajectory.blocks, tuple)
    assert trajectory.finish is None or trajectory.finish
    raised_by(lambda: (trajectory.metrics(), trajectory.token_ids, trajectory.context_ids), apr.AprError)
    raised_by(lambda: apr.causality(trajectory, "kv"), apr.AprError)


def raised_by(work: Callable[[], Any], expected: type[apr.AprError]) -> apr.AprError | None:
    """The error that something raised, if it is of the expected kind. Every other exception fails the test."""
    try:
        work()
    except expected as error:
        return error
    return None


def _events() -> list[dict[str, Any]]:
    import asyncio

    def script(request: apr.Request, prompt: str) -> apr.Reply:
        if prompt.endswith(("1:", "2:")):
            return apr.Reply(" x\n</Thread>")
        if prompt.endswith("</Thread>\n"):
            return apr.Reply("<Conclusion>both</Conclusion>\n</Parallel>\nDone.")
        return apr.Reply(
            "<Parallel>\n<Outlines>\n<Outline>1: a</Outline>\n<Outline>2: b</Outline>\n</Outlines>"
        )

    events: list[Event] = []
    engine = apr.ScriptedEngine(script, apr.ByteTokenizer(apr.dialect("threadweaver").tags))
    trajectory = asyncio.run(apr.areason(engine, "Q: ", "threadweaver", on_event=events.append))
    assert trajectory.blocks
    return [json.loads(json.dumps(event_to_json(event))) for event in events]


EVENTS = _events()
