"""The held-out curve: when it is flat, and what an interrupted run keeps of it."""

from __future__ import annotations

from pathlib import Path

import pytest

import sgl_apr as apr
from sgl_apr.training.config import Model, load_config
from sgl_apr.training.grpo_config import GrpoConfig, HeldOut, Rollouts, Updates
from sgl_apr.training.heldout import HeldOutCurve, HeldOutPoint


def curve(out: Path, *rewards: float) -> HeldOutCurve:
    made = HeldOutCurve(out)
    for step, reward in enumerate(rewards):
        made.add(HeldOutPoint(5 * step, reward, reward, 0.0, 1.0, 300.0, 900.0, {"countdown": reward}, 1.0))
    return made


@pytest.mark.parametrize(
    ("rewards", "flat"),
    [
        ((0.1, 0.2, 0.3), False),  # too few to tell
        ((0.1, 0.2, 0.3, 0.4), False),
        ((0.3, 0.4, 0.4, 0.3), True),
        ((0.1, 0.9, 0.5, 0.5), True),  # one high value among low ones is no reason to go on or to stop
        ((0.0, 0.0, 0.3, 0.4, 0.35, 0.352), True),
        ((0.4, 0.3, 0.2, 0.1), True),
    ],
)
def test_a_curve_is_flat_if_the_last_evaluations_gain_little(tmp_path: Path, rewards, flat: bool):
    made = curve(tmp_path, *rewards)
    assert made.is_flat(2, 0.01) is flat
    assert not made.is_flat(0, 0.01)


def test_a_run_that_continues_keeps_the_evaluations_up_to_its_checkpoint(tmp_path: Path):
    curve(tmp_path, 0.1, 0.2, 0.3)
    again = HeldOutCurve(tmp_path, step=7)
    assert [point.step for point in again.points] == [0, 5]
    again.add(HeldOutPoint(10, 0.25, 0.25, 0.0, 1.0, 300.0, 900.0, {"countdown": 0.25}, 1.0))
    assert [point.reward for point in HeldOutCurve(tmp_path, step=99).points] == [0.1, 0.2, 0.25]


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (Rollouts, {"group": 1}, "rollouts.group = 1, expected at least 2"),
        (Rollouts, {"temperature": 0.0}, "rollouts.temperature = 0.0, expected more than 0"),
        (Rollouts, {"tasks": {"countdown": 0.0}}, "expected a share above 0"),
        (Updates, {"epochs": 0}, "updates.epochs = 0, expected at least 1"),
        (Updates, {"minibatches": 0}, "updates.minibatches = 0, expected at least 1"),
        (Updates, {"clip_ratio": 1.5}, "updates.clip_ratio = 1.5, expected a number between 0 and 1"),
        (HeldOut, {"every": 0, "window": 2}, "heldout.every = 0, expected at least 1 with a window"),
    ],
)
def test_what_cannot_be_run_is_an_error(kind, values: dict, message: str):
    with pytest.raises(apr.AprError, match=message):
        kind(**values)


def test_more_minibatches_than_problems_are_an_error():
    with pytest.raises(apr.AprError, match="at most the 2 problems of a step"):
        GrpoConfig(Model(path="here"), rollouts=Rollouts(problems=2), updates=Updates(minibatches=3))


@pytest.mark.parametrize("path", sorted(Path("configs").glob("*-rl*.toml")), ids=lambda path: path.stem)
def test_shipped_configurations_can_be_read(path: Path):
    config = load_config(GrpoConfig, path)
    assert sum(config.rollouts.shares.values()) == pytest.approx(1.0)


def test_tasks_with_shares_are_read_from_a_file(tmp_path: Path):
    path = tmp_path / "rl.toml"
    path.write_text(
        '[model]\npath = "here"\n[rollouts]\ntasks = { countdown = 4, "countdown:unsolvable" = 1 }\n'
    )
    assert load_config(GrpoConfig, path).rollouts.shares == {"countdown": 0.8, "countdown:unsolvable": 0.2}
