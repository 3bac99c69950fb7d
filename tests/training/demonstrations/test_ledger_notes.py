"""Readings of ledgers: prompts as the method sends them, notes and answers that are right, and a tokenizer that loses nothing."""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import sgl_apr as apr
from sgl_apr.evaluation.tasks.ledger import LedgerKind, LedgerProblem, LedgerTask, Payment, generate_ledgers
from sgl_apr.methods import method
from sgl_apr.tokenizer import HfTokenizer
from sgl_apr.training.config import Data
from sgl_apr.training.demonstrations.__main__ import main
from sgl_apr.training.demonstrations.ledger_notes import (
    KINDS,
    PART_LINES,
    ledger_readings,
    note_of_notes,
    note_of_payments,
    reading_trajectory,
)
from sgl_apr.training.examples import FileExamples
from sgl_apr.training.models import locate_model
from sgl_apr.training.models.ledger import ledger_llama
from sgl_apr.training.training_tree import build_training_tree
from sgl_apr.trajectory.trajectory import Trajectory

LINE = re.compile(r"\[(\d+)\] (\w+) paid (\w+) (\d+) coins for (\w+)\.")
PART_TOKENS = 192


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> HfTokenizer:
    return HfTokenizer(str(ledger_llama(tmp_path_factory.mktemp("ledger"))))


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
            note = note_of_notes(kind, {int(n): note for n, note in re.findall(r"(?m)^(\d+): (.*)", prompt)})
        return note if "Write down in short" in prompt else f"{note}\nAnswer: {note.rpartition(' ')[2]}"

    return apr.ScriptedEngine(reply, tokenizer)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lines", [5, 60, 900])
def test_a_model_that_reads_like_this_answers_correctly(kind: LedgerKind, lines: int, tokenizer: HfTokenizer):
    (problem,) = generate_ledgers(1, lines, kinds=(kind,))
    engine = reader(kind, problem, tokenizer)
    options = {"part_tokens": PART_TOKENS, "reply_tokens": 200, "budget": {"tokens": 500_000}}
    result = asyncio.run(method("recursive")(engine, problem.text, task=LedgerTask(engine), **options))
    assert result.answer == problem.answer
    assert len(engine.requests) > lines / PART_LINES
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
        options = {"part_tokens": PART_TOKENS, "reply_tokens": 200, "budget": {"tokens": 500_000}}
        asyncio.run(method("recursive")(engine, one.text, task=task, **options))
        asyncio.run(method("sequential")(engine, short.text, task=task))
        sent += Counter(shape(tokenizer.decode(request.input_ids)) for request in engine.requests)
    shown = {shape(reading.prompt) for reading in ledger_readings(3000) if reading.kind == kind}
    assert len(sent) >= 4
    assert set(sent) <= shown


def test_readings_are_trained_on_to_their_last_token(tokenizer: HfTokenizer):
    (eos,) = tokenizer.eos_ids
    empty = 0
    for reading in ledger_readings(60, seed=3):
        trajectory = reading_trajectory(reading, tokenizer)
        assert tokenizer.decode(trajectory.spans[0].token_ids or ()) == reading.prompt
        targets = build_training_tree([trajectory], eos=eos).targets
        replies = [reading.reply, *(reply for _, reply in reading.more)]
        assert [*targets] == [i for reply in replies for i in (*tokenizer.encode(reply), eos)]
        assert trajectory.spans[-1].text == replies[-1]
        empty += not reading.reply
    assert 0 < empty < 20


def test_they_are_written_with_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    file, start = tmp_path / "made" / "train.jsonl", tmp_path / "start"
    monkeypatch.setattr("sys.argv", ["x", "ledger", str(file), "--start", str(start), "--count", "12"])
    assert main() == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["demonstrations"] == 12
    made = [Trajectory.from_json(line) for line in file.read_text().splitlines()]
    assert [t.spans[-1].text for t in made] == [
        [r.reply, *(m[1] for m in r.more)][-1] for r in ledger_readings(12)
    ]
    assert (start / "model.safetensors").stat().st_size < 4_000_000
    examples = FileExamples(Data(path=str(file), shuffle=False), HfTokenizer(str(start)))
    assert list(examples.trajectories(0))[: len(made)] == made
    assert (
        list(FileExamples(Data(path=str(file)), HfTokenizer(str(start))).trajectories(0))[: len(made)] != made
    )


def test_texts_grow():
    lines = [len(LINE.findall(reading.message)) for reading in ledger_readings(1400)]
    assert max(lines[:140]) <= 3
    assert max(lines[-140:]) > 40


def test_the_start_has_what_the_built_in_model_knows(tokenizer: HfTokenizer, tmp_path: Path):
    load = AutoModelForCausalLM.from_pretrained
    start, builtin = load(ledger_llama(tmp_path)), load(locate_model("builtin"))
    for name, weight in builtin.model.layers.state_dict().items():
        assert start.model.layers.state_dict()[name].equal(weight)
    (own,), (old,) = tokenizer.encode(" 42"), HfTokenizer(str(locate_model("builtin"))).encode(" 42")
    assert start.get_input_embeddings().weight[own].equal(builtin.get_input_embeddings().weight[old])
