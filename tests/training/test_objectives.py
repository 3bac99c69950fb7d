"""The weights of losses: of tags, and of tags where a fork goes on or ends."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import sgl_apr as apr
from sgl_apr.evaluation.tasks.countdown.demonstrations import demonstration
from sgl_apr.evaluation.tasks.countdown.expert import SearchStyle
from sgl_apr.evaluation.tasks.countdown.problems import generate_problems
from sgl_apr.tokenizer import HfTokenizer
from sgl_apr.training.collate import Collator, log_probabilities
from sgl_apr.training.config import Data, Steps
from sgl_apr.training.device import load_model
from sgl_apr.training.examples import make_examples
from sgl_apr.training.models.countdown import countdown_llama
from sgl_apr.training.objectives import Likelihood
from sgl_apr.training.training_tree import build_training_tree


@pytest.mark.parametrize("name", ["multiverse", "threadweaver", "spawn"])
def test_what_decides_a_width_is_a_tag_for_each_branch_and_one_for_the_end(tmp_path: Path, name: str):
    path = countdown_llama(tmp_path, apr.dialect(name).tags, layers=1, hidden=32)
    tokenizer, model = HfTokenizer(path), load_model(path)
    problem = next(iter(generate_problems(1, "train", numbers=(4,))))
    style = SearchStyle(window=1024, forks={4: 1.0}, width=(5, 5), revisit_rate=0.0)
    trajectory = asyncio.run(demonstration(problem, tokenizer, seed=0, style=style, target_dialect=name))
    tree = build_training_tree([trajectory], join="kv" if name == "multiverse" else None)
    objective = Likelihood(
        make_examples(Data(dialects=(name,), problems=1, numbers=(4,)), tokenizer), model, tokenizer, Steps()
    )
    batch = Collator(attention="later")([tree])
    chosen = objective._decides_width(batch)
    names = [tokenizer.decode([token]) for token in batch["targets"][chosen].tolist()]
    outline, end = {"spawn": ("<Message>", "</Spawn>"), "multiverse": ("<Outline>", "</Goal>")}.get(
        name, ("<Outline>", "</Outlines>")
    )
    assert names.count(outline) == 5  # the first of them has no choice
    assert names.count(end) == 1

    plain = float(objective.loss(model, [[tree]])[0].detach())
    weighted = Likelihood(objective.examples, model, tokenizer, Steps(width_weight=3.0))
    values = log_probabilities(model, batch).detach()
    weights = torch.where(chosen, 3.0, 1.0)
    expected = float(-(values * weights).sum() / weights.sum())
    assert float(weighted.loss(model, [[tree]])[0].detach()) == pytest.approx(expected, rel=1e-4)
    assert plain == pytest.approx(float(-values.mean()), rel=1e-4)


def test_the_answer_after_a_fork_has_its_own_weight(tmp_path: Path):
    path = countdown_llama(tmp_path, apr.dialect("multiverse").tags, layers=1, hidden=32)
    tokenizer, model = HfTokenizer(path), load_model(path)
    data = Data(dialects=("multiverse",), problems=4, numbers=(4,), forks={"4": 1.0}, window=1024)
    plain = make_examples(data, tokenizer)
    weighted = make_examples(replace(data, answer_weight=5.0), tokenizer)
    (trajectory, *_), (tree, *_) = plain.trajectories(0), weighted.chunk(0)
    assert tree.weights is not None
    heavy = [tokenizer.decode([token]) for token in tree.targets[tree.weights == 5.0].tolist()]
    assert "".join(heavy).removesuffix("<|endoftext|>").strip() == trajectory.answer.strip()
    assert set(tree.weights.tolist()) == {1.0, 5.0}

    batch = Collator(attention="later")([tree])
    values = log_probabilities(model, batch).detach()
    weights = torch.from_numpy(tree.weights)
    expected = float(-(values * weights).sum() / weights.sum())
    loss, count = Likelihood(weighted, model, tokenizer, Steps()).loss(model, [[tree]])
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-4)
    assert count == len(weights)
