"""Readings of ledgers: prompts as the method sends them, notes and answers that are right, and a tokenizer that loses nothing."""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from pathlib import Path

import pytest

import sgl_apr as apr
from sgl_apr.evaluation.tasks.ledger import LedgerKind, LedgerProblem, LedgerTask, Payment, generate_ledgers
from sgl_apr.methods import method
from sgl_apr.tokenizer import HfTokenizer
from sgl_apr.training.demonstrations.__main__ import main
from sgl_apr.training.demonstrations.ledger_notes import (
    KINDS,
    PART_LINES,
    ledger_readings,
    note_of_notes,
    note_of_payments,
    reading_trajectory,
)
from sgl_apr.training.models.pretrained import smollm2
from sgl_apr.training.training_tree import build_training_tree
from sgl_apr.trajectory.trajectory import Trajectory

LINE = re.compile(r"\[(\d+)\] (\w+) paid (\w+) (\d+) coins for (\w+)\.")
PART_TOKENS = 320


@pytest.fixture(scope="module")
def tokenizer() -> HfTokenizer:
    return HfTokenizer(str(smollm2()))


def reader(kind: LedgerKind, problem: LedgerProblem, tokenizer: HfTokenizer) -> apr.ScriptedEngine:
    """Reads every prompt of the method as the demonstrations do."""

    def reply(_: apr.Request, prompt: str) -> str:
        payments = tuple(
            Payment(int(n), payer, payee, int(coins), goods)
            for n, payer, payee, coins, goods in LINE.findall(prompt)
        )
        if payments:
            note = note_of_payments(LedgerProblem(payments, kind, problem.person, problem.number))
        else:
            note = note_of_notes(
                problem, {int(n): note for n, note in re.findall(r"(?m)^(\d+): (.*)", prompt)}
            )
        return note if "Write down in short" in prompt else f"{note}\nAnswer: {note.rpartition(' ')[2]}"

    return apr.ScriptedEngine(reply, tokenizer)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lines", [5, 60, 900])
def test_a_model_that_reads_like_this_answers_correctly(kind: LedgerKind, lines: int, tokenizer: HfTokenizer):
    (problem,) = generate_ledgers(1, lines, kinds=(kind,))
    engine = reader(kind, problem, tokenizer)
    options = {"part_tokens": PART_TOKENS, "reply_tokens": 256, "budget": {"tokens": 500_000}}
    result = asyncio.run(method("recursive")(engine, problem.text, task=LedgerTask(engine), **options))
    assert result.answer == problem.answer
    assert len(engine.requests) > lines / (PART_LINES + 2)
    assert max(len(request.input_ids) for request in engine.requests) < PART_TOKENS + 100


def shape(prompt: str) -> str:
    """A prompt without its payments, notes, numbers and names."""
    prompt = LINE.sub("LINE", prompt)
    prompt = re.sub(r"(?m)^\d+: .*$", "NOTE", prompt)
    prompt = re.sub(r"\b(did|line) \w+", r"\1 X", re.sub(r"Part \d+ of \d+", "Part", prompt))
    return re.sub(r"((LINE|NOTE)\n)+", r"\2\n", prompt)


@pytest.mark.parametrize("kind", KINDS)
def test_every_prompt_of_the_method_has_demonstrations(kind: LedgerKind, tokenizer: HfTokenizer):
    (problem,) = generate_ledgers(1, 900, kinds=(kind,))
    (short,) = generate_ledgers(1, 9, kinds=(kind,))
    sent = Counter[str]()
    for one in (problem, short):
        engine = reader(kind, one, tokenizer)
        task = LedgerTask(engine)
        options = {"part_tokens": PART_TOKENS, "reply_tokens": 256, "budget": {"tokens": 500_000}}
        asyncio.run(method("recursive")(engine, one.text, task=task, **options))
        asyncio.run(method("sequential")(engine, short.text, task=task))
        sent += Counter(shape(tokenizer.decode(request.input_ids)) for request in engine.requests)
    shown = {shape(reading.prompt) for reading in ledger_readings(3000) if reading.kind == kind}
    assert len(sent) >= 4
    assert set(sent) <= shown


def test_readings_are_trained_on_to_their_last_token(tokenizer: HfTokenizer):
    (eos,) = tokenizer.eos_ids
    absent = 0
    for reading in ledger_readings(60, seed=3):
        trajectory = reading_trajectory(reading, tokenizer)
        assert tokenizer.decode(trajectory.spans[0].token_ids or ()) == reading.prompt
        targets = build_training_tree([trajectory], eos=eos).targets
        replies = [reading.reply, *(reply for _, reply in reading.more)]
        assert [*targets] == [i for reply in replies for i in (*tokenizer.encode(reply), eos)]
        assert trajectory.spans[-1].text == replies[-1]
        absent += sum("none" in reply for reply in replies)
    assert 0 < absent < 200


def test_they_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "made" / "train.jsonl"
    monkeypatch.setattr("sys.argv", ["x", "ledger", str(file), "--model", str(smollm2()), "--count", "12"])
    assert main() == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["demonstrations"] == 12
    made = [Trajectory.from_json(line) for line in file.read_text().splitlines()]
    assert [t.spans[-1].text for t in made] == [
        [r.reply, *(m[1] for m in r.more)][-1] for r in ledger_readings(12)
    ]
