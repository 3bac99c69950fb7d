"""The configuration of reinforcement: what a step samples, how it learns from that, and how a run is evaluated."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from sgl_apr.errors import AprError
from sgl_apr.training.advantages import Advantages
from sgl_apr.training.config import Model

BranchCredit = Literal["own", "group", "trunk"]


@dataclass(frozen=True, slots=True)
class Rollouts:
    """What one GRPO step learns from: `group` replies to each of `problems` problems, by a real server.

    Attributes:
        task: The problems, as `sgl-apr eval` takes them: "countdown", "countdown:4,unsolvable", "game24", "gym:NAME" or a
            file "FILE.jsonl". Generated problems are of the split "train".
        tasks: Several tasks in place of `task`, each with its share of the problems.
        pool: Problems that steps draw from, the held-out ones included. They are generated at the start, which takes 50 ms for each
            problem of Countdown with five numbers.
        problems: Problems of one step.
        group: Replies to each.
        temperature: Of the replies.
        tokens: Budget of each reply, as are `branch_tokens`, `width`, `depth` and `blocks`.
        branch_tokens: See `tokens`.
        width: See `tokens`.
        depth: See `tokens`.
        blocks: See `tokens`.
        mode: As for `areason`.
        join: As for `areason`; empty is the published one of the format, or by text where the server cannot.
        reward: One of `sgl_apr.training.rewards`.
        parallel: Weight of the parallel term of "gated".
        length: What "gated" and "apr" subtract for 1,000 tokens of the critical path.
        advantage: "mean" (ThreadWeaver's P-GRPO), "grpo" or "papo".
        seed: Seed of the problems.
    """

    task: str = "countdown"
    tasks: dict[str, float] = field(default_factory=dict)
    pool: int = 4_000
    problems: int = 32
    group: int = 8
    temperature: float = 1.0
    tokens: int = 6000
    branch_tokens: int = 160
    width: int = 16
    depth: int = 1
    blocks: int = 4
    mode: Literal["auto", "sequential", "parallel"] = "auto"
    join: Literal["text", "kv", "message", ""] = ""
    reward: str = "gated"
    parallel: float = 0.3
    length: float = 0.0
    advantage: Advantages = "mean"
    seed: int = 0

    def __post_init__(self) -> None:
        _require(self.problems >= 1, "rollouts.problems", self.problems, "at least 1")
        _require(self.group >= 2, "rollouts.group", self.group, "at least 2 replies to compare")
        _require(self.temperature > 0, "rollouts.temperature", self.temperature, "more than 0")
        wrong = [name for name, share in self.tasks.items() if not share > 0]
        _require(not wrong, "rollouts.tasks", self.tasks, "a share above 0 for each task")

    @property
    def shares(self) -> dict[str, float]:
        """The tasks with their shares, which add up to 1."""
        tasks = self.tasks or {self.task: 1.0}
        return {name: share / sum(tasks.values()) for name, share in tasks.items()}


@dataclass(frozen=True, slots=True)
class Updates:
    """How it learns from them: `epochs` times `minibatches` gradient steps for the replies of a step.

    A gradient step has length `rate` where the norm of the gradient is `clip` or more, and is proportionally shorter below.

    Attributes:
        steps: Number of steps at most.
        rate: Learning rate.
        epochs: How often the replies of a step are learned from.
        minibatches: Into how many parts they are divided, by problem, each of which is one gradient step.
        clip_ratio: Beyond 1 plus or minus this, ratios of the new to the old policy earn nothing more (PPO).
        branch_credit: The advantage of the tokens of a branch: "group" is that of the reply; "own" is that of the branch by its own
            success, which needs a task that judges branches; with "trunk" they have none, since the reward of a reply says little
            about each of its branches.
        batch: Tokens that go through the model at once.
        clip: Gradient norm above which gradients are clipped.
        checkpoint: Steps between checkpoints.
        seed: Seed of PyTorch and of the order of minibatches.
    """

    steps: int = 30
    rate: float = 0.05
    epochs: int = 1
    minibatches: int = 1
    clip_ratio: float = 0.2
    branch_credit: BranchCredit = "group"
    batch: int = 16_384
    clip: float = 1.0
    checkpoint: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        _require(self.epochs >= 1, "updates.epochs", self.epochs, "at least 1")
        _require(self.minibatches >= 1, "updates.minibatches", self.minibatches, "at least 1")
        _require(0 < self.clip_ratio < 1, "updates.clip_ratio", self.clip_ratio, "a number between 0 and 1")


@dataclass(frozen=True, slots=True)
class HeldOut:
    """How a run is evaluated while it trains: greedy replies to problems that no step draws.

    Attributes:
        problems: How many, divided among the tasks by their shares.
        every: Steps between evaluations. There is one before the first step and one after the last, too. 0 is none at all.
        window: Evaluations that are compared to tell whether the curve is flat (`HeldOutCurve.is_flat`), which ends the run. 0 never
            ends it.
        min_gain: Smallest gain of the mean reward that is no flat curve.
    """

    problems: int = 200
    every: int = 5
    window: int = 0
    min_gain: float = 0.01

    def __post_init__(self) -> None:
        _require(self.problems >= 1, "heldout.problems", self.problems, "at least 1")
        _require(self.every >= 0, "heldout.every", self.every, "at least 0")
        _require(self.window >= 0, "heldout.window", self.window, "at least 0")
        _require(not self.window or self.every > 0, "heldout.every", self.every, "at least 1 with a window")


@dataclass(frozen=True, slots=True)
class GrpoConfig:
    """Configuration of `sgl-apr train grpo`."""

    model: Model
    dialect: str = "spawn"
    rollouts: Rollouts = field(default_factory=Rollouts)
    updates: Updates = field(default_factory=Updates)
    heldout: HeldOut = field(default_factory=HeldOut)

    def __post_init__(self) -> None:
        parts, problems = self.updates.minibatches, self.rollouts.problems
        _require(
            parts <= problems, "updates.minibatches", parts, f"at most the {problems} problems of a step"
        )


def _require(holds: bool, name: str, value: object, expected: str) -> None:
    if not holds:
        raise AprError(f"{name} = {value!r}, expected {expected}")
