"""Masks that are replayed, against a matcher that goes token by token."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from llguidance import LLMatcher
from llguidance.hf import from_tokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask
from transformers import AutoTokenizer

import sgl_apr as apr
from sgl_apr.evaluation.tasks.countdown import demonstrations
from sgl_apr.evaluation.tasks.countdown.problems import generate_problems
from sgl_apr.tokenizer import HfTokenizer
from sgl_apr.training.attention_mask import Visibility
from sgl_apr.training.mask_replay import UNMASKED, MaskReplay, RecordedGrammars, visible_tokens
from sgl_apr.training.models.countdown import countdown_llama
from sgl_apr.training.training_tree import TrainingTree, build_training_tree

DIALECTS = ("threadweaver", "multiverse", "spawn")


@pytest.fixture(scope="module")
def begin(tmp_path_factory) -> Path:
    tags = dict.fromkeys(tag for name in DIALECTS for tag in apr.dialect(name).tags)
    return countdown_llama(tmp_path_factory.mktemp("begin"), list(tags), layers=1, hidden=32)


@pytest.fixture
def replay(begin: Path) -> MaskReplay:
    return MaskReplay(begin, HfTokenizer(begin).vocab_size)


class Recording(demonstrations.ScriptedEngine):
    """Records grammars as `RecordingEngine` does, and reports log-probabilities."""

    recorded: ClassVar[list[Recording]] = []

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.grammars, self.results = RecordedGrammars(), []
        self.recorded.append(self)

    async def decode(self, request, on_tokens=None):
        result = await super().decode(request, on_tokens)
        result = replace(result, logprobs=(-1.0,) * len(result.token_ids))
        self.grammars.add(request, result)
        self.results.append((request, result))
        return result


def recorded(begin: Path, name: str, monkeypatch) -> tuple[apr.Trajectory, TrainingTree, Recording]:
    monkeypatch.setattr(demonstrations, "ScriptedEngine", Recording)
    problem = next(generate_problems(1, "train", numbers=(4,)))
    make = demonstrations.demonstration(problem, HfTokenizer(begin), seed=1, target_dialect=name)
    trajectory = asyncio.run(make)
    return trajectory, build_training_tree([trajectory], eos=0), Recording.recorded[-1]


@pytest.mark.parametrize("name", DIALECTS)
def test_masks_are_those_of_a_matcher_that_goes_token_by_token(
    begin: Path, replay: MaskReplay, name: str, monkeypatch
):
    trajectory, tree, engine = recorded(begin, name, monkeypatch)
    numbers = replay.replay(tree, trajectory, engine.grammars)
    rows = replay.allowed_tokens(torch.from_numpy(numbers))
    assert rows.shape == (len(tree.targets), replay.vocabulary)
    assert rows[torch.arange(len(rows)), torch.from_numpy(tree.targets)].all()
    tokenizer = AutoTokenizer.from_pretrained(begin)
    guide, size = from_tokenizer(tokenizer, n_vocab=replay.vocabulary), replay.vocabulary
    expected = []
    for request, result in engine.results:
        matcher = LLMatcher(guide, request.grammar)
        for token in result.token_ids:
            bits = allocate_token_bitmask(1, size)
            fill_next_token_bitmask(matcher, bits)
            allowed = np.unpackbits(bits.view(np.uint8), bitorder="little")[:size].astype(bool)
            expected.append((token, allowed.tobytes()))
            matcher.consume_token(token)
    found = [(int(t), row.numpy().tobytes()) for t, row in zip(tree.targets, rows, strict=True)]
    assert sorted(found) == sorted(expected)
    assert 1 < len(np.unique(numbers)) < len(numbers)  # equal masks are kept once


@pytest.mark.parametrize("join", ["text", "kv"])
def test_the_prompt_of_a_call_is_what_its_tokens_see(begin: Path, join, monkeypatch):
    trajectory, _, _ = recorded(begin, "multiverse", monkeypatch)
    tree = build_training_tree([trajectory], eos=0, join=join).tree
    dense = Visibility.from_trees([tree]).dense_mask()[0, 0].numpy()
    for index in range(len(tree.token_ids)):
        assert (visible_tokens(tree, index) == tree.token_ids[dense[index]]).all()


def test_what_a_grammar_does_not_allow_is_an_error(begin: Path, replay: MaskReplay, monkeypatch):
    trajectory, tree, engine = recorded(begin, "spawn", monkeypatch)
    for request, result in engine.results:
        digit = 'start: "7"\n'
        engine.grammars.add(replace(request, grammar=digit), result)
    with pytest.raises(apr.AprError, match="does not allow what was decoded"):
        replay.replay(tree, trajectory, engine.grammars)


def test_calls_that_were_not_recorded_are_an_error(begin: Path, replay: MaskReplay, monkeypatch):
    trajectory, tree, _ = recorded(begin, "spawn", monkeypatch)
    with pytest.raises(apr.AprError, match="not recorded"):
        replay.replay(tree, trajectory, RecordedGrammars())


def test_calls_without_a_grammar_are_unmasked(begin: Path, replay: MaskReplay, monkeypatch):
    trajectory, tree, engine = recorded(begin, "spawn", monkeypatch)
    for request, result in engine.results:
        engine.grammars.add(replace(request, grammar=None), result)
    assert (replay.replay(tree, trajectory, engine.grammars) == UNMASKED).all()
    assert replay.allowed_tokens(torch.tensor([UNMASKED])).all()


def test_another_grammar_backend_is_an_error(begin: Path):
    with pytest.raises(apr.UnsupportedEngine, match="xgrammar"):
        MaskReplay(begin, 10, "xgrammar")


def test_a_call_may_have_a_single_token(begin: Path, replay: MaskReplay, monkeypatch):
    trajectory, tree, engine = recorded(begin, "spawn", monkeypatch)
    last = [replace(call, logprobs=None) for call in trajectory.calls[:-1]]
    (request, result), grammars = engine.results[-1], RecordedGrammars()
    span = max(k for k, s in enumerate(trajectory.spans) if s.call == len(trajectory.calls) - 1)
    own = np.flatnonzero(tree.spans == span)[:1]
    grammars.add(replace(request, grammar=request.grammar), replace(result, token_ids=result.token_ids[:1]))
    short = replace(
        tree, sources=tree.sources[own], targets=tree.targets[own], spans=tree.spans[own],
        trajectories=tree.trajectories[own],
    )  # fmt: skip
    numbers = replay.replay(short, replace(trajectory, calls=(*last, trajectory.calls[-1])), grammars)
    allowed = replay.allowed_tokens(torch.from_numpy(numbers))
    assert numbers[0] != UNMASKED
    assert allowed[0, result.token_ids[0]]
