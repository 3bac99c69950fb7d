"""GRPO: sample replies on a real server through the runtime, update the policy, load the new weights into the server, repeat."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from sgl_apr.errors import AprError
from sgl_apr.evaluation.tasks.countdown.attempts import SERVER_OPTIONS
from sgl_apr.server.launch.launcher import Server
from sgl_apr.training.advantages import group_advantages
from sgl_apr.training.branch_credit import branch_advantages, sequence_advantages
from sgl_apr.training.checkpoint import (
    LOG_FILE,
    Progress,
    export_model,
    load_checkpoint,
    save_checkpoint,
    start_run,
    write_errors,
)
from sgl_apr.training.device import device, load_model
from sgl_apr.training.grpo_config import GrpoConfig
from sgl_apr.training.grpo_log import GrpoStepLog
from sgl_apr.training.heldout import HeldOutCurve, HeldOutPoint, evaluate_heldout
from sgl_apr.training.mask_replay import MaskReplay, RecordedGrammars, RecordingEngine
from sgl_apr.training.models import locate_model
from sgl_apr.training.policy_samples import make_policy_samples
from sgl_apr.training.ppo import UpdateStatistics, update_policy
from sgl_apr.training.rewards import reward
from sgl_apr.training.rollouts import ProblemPool, Rollout, sample_rollouts
from sgl_apr.training.weight_sync import load_weights
from sgl_apr.trajectory.spans import Path as SequencePath

WEIGHTS_DIR = "weights"  # from which the server loads each update
TIMEOUT_S = 600.0


def train(
    config: GrpoConfig,
    out: Path,
    on_update: Callable[[GrpoStepLog], None] | None = None,
    on_heldout: Callable[[HeldOutPoint], None] | None = None,
) -> Path:
    """Train as configured.

    A run that was interrupted continues after its last checkpoint. Each step draws its problems by its own number.

    Args:
        config: The configuration.
        out: Directory of the run, for log, checkpoints and model.
        on_update: Called after each step.
        on_heldout: Called after each evaluation of held-out problems.

    Returns:
        The trained model, as a checkpoint that a server can load.

    Raises:
        AprError: If the configuration cannot be run, or the directory cannot be written.
    """
    reward(config.rollouts.reward)  # raises for an unknown name before anything runs
    if config.rollouts.reward == "npr" and config.rollouts.advantage != "papo":
        raise AprError('reward = "npr" drops malformed replies, expected advantage = "papo"')
    start = start_run(config, Path(locate_model(config.model.path)), out)
    run = GrpoRun(config, out, start)
    if run.is_evaluation_due or not run.is_complete:
        _advance_to_end(run, on_update, on_heldout)
    return export_model(out / "model", run.model, start)


def _advance_to_end(
    run: GrpoRun,
    on_update: Callable[[GrpoStepLog], None] | None,
    on_heldout: Callable[[HeldOutPoint], None] | None,
) -> None:
    """Start a server of the run's weights, and take all remaining steps on it."""
    out, updates = run.out, run.config.updates
    export_model(out / WEIGHTS_DIR, run.model, run.start)
    with (
        write_errors(out),
        Server(out / WEIGHTS_DIR, log_path=out / "server.log", **SERVER_OPTIONS) as server,
        (out / LOG_FILE).open("a", buffering=1, encoding="utf-8") as log,
    ):
        while True:
            if run.is_evaluation_due:
                point = run.evaluate(server.url)
                if on_heldout:
                    on_heldout(point)
            if run.is_complete:
                break
            update = asyncio.run(run.advance(server.url))
            log.write(json.dumps(asdict(update)) + "\n")
            if on_update:
                on_update(update)
            if run.step % updates.checkpoint == 0 or run.step == updates.steps:
                run.save()
        run.save()


class GrpoRun:
    """The state of a run: its policy, its problems, and how far it has come.

    Args:
        config: The configuration.
        out: Directory of the run; the run continues after the last checkpoint in it.
        start: The checkpoint that the run starts from.
    """

    def __init__(self, config: GrpoConfig, out: Path, start: Path) -> None:
        self.config, self.out, self.start = config, out, start
        torch.manual_seed(config.updates.seed)
        self.model: Any = load_model(start)
        self.model.to(device())
        # Not Adam: it scales all coordinates of the gradient alike, and most of them are noise with a few hundred replies.
        self._optimizer = torch.optim.SGD(self.model.parameters(), lr=config.updates.rate)
        self.step = load_checkpoint(out, self.model, self._optimizer).step
        self.curve = HeldOutCurve(out, self.step)
        self._problems = ProblemPool(config.rollouts, config.heldout.problems if config.heldout.every else 0)
        self._replay = MaskReplay(start, self.model.config.vocab_size)

    @property
    def is_complete(self) -> bool:
        """Whether all steps are done, or the held-out curve is flat."""
        heldout = self.config.heldout
        return self.step >= self.config.updates.steps or self.curve.is_flat(heldout.window, heldout.min_gain)

    @property
    def is_evaluation_due(self) -> bool:
        """Whether the held-out problems are to be evaluated now, and were not before an interruption."""
        every = self.config.heldout.every
        if not every or any(point.step == self.step for point in self.curve.points):
            return False
        return self.step % every == 0 or self.step >= self.config.updates.steps

    def save(self) -> None:
        """Save a checkpoint."""
        save_checkpoint(self.out, self.model, self._optimizer, Progress(self.step))

    def evaluate(self, url: str) -> HeldOutPoint:
        """Evaluate the held-out problems, and add the result to the curve."""
        problems = self._problems.heldout
        point = asyncio.run(evaluate_heldout(url, problems, self.config, self.step, TIMEOUT_S))
        self.curve.add(point)
        return point

    async def advance(self, url: str) -> GrpoStepLog:
        """One step: sample replies, learn from them, and load the new weights into the server."""
        began, rollouts = time.monotonic(), self.config.rollouts
        drawn = self._problems.draw(self.step)
        problems = [problem for problem in drawn for _ in range(rollouts.group)]
        async with await RecordingEngine.connect(url, timeout=TIMEOUT_S) as engine:
            own = self.config.updates.branch_credit == "own"
            judges = [problem.judge_branches(engine) for problem in drawn] if own else None
            replies = await sample_rollouts(
                engine,
                problems,
                self.config.dialect,
                rollouts,
                temperature=rollouts.temperature,
                logprobs=True,
            )  # all end before the weights change
            sampled = time.monotonic()
            score = reward(
                rollouts.reward, step=self.step, parallel=rollouts.parallel, length=rollouts.length
            )
            rewards = [score(reply.trajectory, reply.correct) for reply in replies]
            statistics = self.learn(replies, rewards, engine.grammars, judges)
            export_model(self.out / WEIGHTS_DIR, self.model, self.start)
            await load_weights(url, self.out / WEIGHTS_DIR, f"{self.step + 1}")
        self.step += 1
        learned = time.monotonic()
        return GrpoStepLog.from_replies(
            self.step - 1, replies, rewards, statistics, sample_s=sampled - began, learn_s=learned - sampled
        )

    def learn(
        self,
        replies: Sequence[Rollout],
        rewards: Sequence[float | None],
        grammars: RecordedGrammars,
        judges: Sequence[Callable[[str], bool]] | None = None,
    ) -> UpdateStatistics:
        """Update the policy.

        Args:
            replies: The replies, one group after another.
            rewards: Their rewards.
            grammars: The grammars of their calls.
            judges: For each problem: whether the text of a branch solves it, for the branch credit "own".
        """
        updates, size = self.config.updates, self.config.rollouts.group
        groups = [replies[k : k + size] for k in range(0, len(replies), size)]
        kind = self.config.rollouts.advantage
        values = group_advantages(kind, [rewards[k : k + size] for k in range(0, len(rewards), size)])
        own: list[dict[SequencePath, float]] = [{}] * len(replies)
        if judges is not None:
            own = branch_advantages([[r.trajectory for r in group] for group in groups], judges, kind)
        samples = [
            make_policy_samples(
                reply.trajectory,
                sequence_advantages(reply.trajectory, advantage, updates.branch_credit, of_branches),
                self._replay,
                grammars,
            )
            for reply, advantage, of_branches in zip(
                replies, [a for group in values for a in group], own, strict=True
            )
        ]
        by_group = [samples[k : k + size] for k in range(0, len(samples), size)]
        return update_policy(
            self.model, self._optimizer, by_group, self._replay, updates,
            temperature=self.config.rollouts.temperature, seed=self.step,
        )  # fmt: skip
