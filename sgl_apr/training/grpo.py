"""GRPO: sample replies on a real server through the runtime, update the policy, load the new weights into the server, repeat."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from sgl_apr.engine.http import HttpEngine
from sgl_apr.engine.http_client import post_json_async
from sgl_apr.errors import AprError, EngineError
from sgl_apr.evaluation.tasks.countdown.attempts import SERVER_OPTIONS, Attempt, attempt_problems
from sgl_apr.evaluation.tasks.countdown.problems import Problem, generate_problems
from sgl_apr.runtime.budget import Budget
from sgl_apr.server.launch.launcher import Server
from sgl_apr.tokenizer import HfTokenizer
from sgl_apr.training.advantages import grpo, mean_only, papo
from sgl_apr.training.batches import batch_by_length
from sgl_apr.training.checkpoint import (
    LOG_FILE,
    Progress,
    export_model,
    load_checkpoint,
    save_checkpoint,
    start_run,
    write_errors,
)
from sgl_apr.training.collate import Collator, log_probabilities, to_device
from sgl_apr.training.config import GrpoConfig, Rollouts
from sgl_apr.training.device import device
from sgl_apr.training.rewards import reward
from sgl_apr.training.training_tree import Floats, TrainingTree, build_training_tree
from sgl_apr.trajectory.trajectory import Trajectory

PROBLEM_POOL_SIZE = 20_000  # training problems that every step draws from
WEIGHTS_DIR = "weights"  # from which the server loads each update


@dataclass(frozen=True, slots=True)
class GrpoStepLog:
    """One step, and one line of the log; means over the replies of the step.

    Attributes:
        step: Counted from 0.
        weights: The server's version of the weights that wrote the replies.
        reward: Mean reward.
        accuracy: Share of correct replies.
        total: Decoded tokens.
        critical_path: Tokens of the critical path.
        forked: Share of replies with a fork.
        forked_3: The same for problems of three numbers.
        forked_4: The same for problems of four numbers.
        width: Branches per fork.
        norm: See `update_policy`.
        gradient_cosine: See `update_policy`.
        sample_s: Seconds of sampling.
        learn_s: Seconds of the update.
    """

    step: int
    weights: str
    reward: float
    accuracy: float
    total: float
    critical_path: float
    forked: float
    forked_3: float
    forked_4: float
    width: float
    norm: float
    gradient_cosine: float
    sample_s: float
    learn_s: float


def train(config: GrpoConfig, out: Path, on_update: Callable[[GrpoStepLog], None] | None = None) -> Path:
    """Train as configured.

    A run that was interrupted continues after its last checkpoint. Each step draws its problems by its own number.

    Args:
        config: The configuration.
        out: Directory of the run, for log, checkpoints and model.
        on_update: Called after each step.

    Returns:
        The trained model, as a checkpoint that a server can load.

    Raises:
        AprError: If the configuration cannot be run, or the directory cannot be written.
    """
    reward(config.rollouts.reward)  # raises for an unknown name before anything runs
    if config.rollouts.reward == "npr" and config.rollouts.advantage != "papo":
        raise AprError('reward = "npr" drops malformed replies, expected advantage = "papo"')
    start = start_run(config, Path(config.model.path), out)
    torch.manual_seed(config.updates.seed)
    model: Any = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32, attn_implementation="sdpa")
    model.to(device())
    # Not Adam: it scales all coordinates of the gradient alike, and most of them are noise with a few hundred replies.
    optimizer = torch.optim.SGD(model.parameters(), lr=config.updates.rate)
    step = load_checkpoint(out, model, optimizer).step
    pool = list(
        generate_problems(
            PROBLEM_POOL_SIZE, "train", seed=config.rollouts.seed + 1, numbers=config.rollouts.numbers
        )
    )
    export_model(out / WEIGHTS_DIR, model, start)
    with (
        write_errors(out),
        Server(
            out / WEIGHTS_DIR, log_path=out / "server.log", context_length=2048, **SERVER_OPTIONS
        ) as server,
        (out / LOG_FILE).open("a", buffering=1, encoding="utf-8") as log,
    ):
        while step < config.updates.steps:
            update = asyncio.run(_step(config, step, server.url, model, optimizer, pool, out, start))
            step += 1
            log.write(json.dumps(asdict(update)) + "\n")
            if on_update:
                on_update(update)
            if step % config.updates.checkpoint == 0 or step == config.updates.steps:
                save_checkpoint(out, model, optimizer, Progress(step))
    return export_model(out / "model", model, start)


async def _step(
    config: GrpoConfig,
    step: int,
    url: str,
    model: Any,
    optimizer: torch.optim.Optimizer,
    pool: Sequence[Problem],
    out: Path,
    start: Path,
) -> GrpoStepLog:
    began = time.monotonic()
    drawn = random.Random(f"{config.rollouts.seed} {step}").sample(pool, config.rollouts.problems)
    async with await HttpEngine.connect(url, timeout=600) as engine:
        attempts = await sample_attempts(engine, drawn, config)  # all end before the weights change
        sampled = time.monotonic()
        rollouts = config.rollouts
        score = reward(rollouts.reward, step=step, parallel=rollouts.parallel, length=rollouts.length)
        rewards = [score(attempt.trajectory, attempt.correct) for attempt in attempts]
        advantages = _advantages(rollouts, rewards)
        eos = min(HfTokenizer(start).eos_ids)
        trajectories = [attempt.trajectory for attempt in attempts]
        norm, cosine = update_policy(model, optimizer, trajectories, advantages, eos, config)
        export_model(out / WEIGHTS_DIR, model, start)
        await load_weights(url, out / WEIGHTS_DIR, f"{step + 1}")
    return _step_log(step, attempts, rewards, norm, cosine, sampled - began, time.monotonic() - sampled)


async def sample_attempts(engine: HttpEngine, drawn: Sequence[Problem], config: GrpoConfig) -> list[Attempt]:
    """Sample a group of attempts at each problem, one group after another in the list."""
    rollouts = config.rollouts
    budget = Budget(
        tokens=rollouts.tokens,
        branch_tokens=rollouts.branch_tokens,
        width=rollouts.width,
        blocks=rollouts.blocks,
    )
    every = [problem for problem in drawn for _ in range(rollouts.group)]
    return await attempt_problems(
        engine, every, config.dialect, budget=budget, mode=rollouts.mode, temperature=rollouts.temperature,
        pacing=None,
    )  # fmt: skip


def update_policy(
    model: Any,
    optimizer: torch.optim.Optimizer,
    trajectories: Sequence[Trajectory],
    advantages: Sequence[float],
    eos: int,
    config: GrpoConfig,
) -> tuple[float, float]:
    """One policy-gradient step.

    The loss sums the log-probabilities of a reply's decoded tokens, weighted by its advantage, and averages over replies. It does
    not divide by length (Dr. GRPO: Liu 2025, arXiv 2503.20783, section 3). The replies come from these very weights, so
    ratios of new to old policy are 1 and clip nothing (on-policy, without a KL term). The grammar's mask on the policy is not
    replayed.

    Returns:
        The norm of the gradient, and the cosine between the gradients of the two halves of the replies, which shows how
        much of it is not noise; both are 0 if there is no gradient.
    """
    model.train()
    optimizer.zero_grad(set_to_none=True)
    half, halves = len(trajectories) // 2, list[torch.Tensor]()
    for part in (slice(half), slice(half, None)):
        trees = _weighted_trees(trajectories[part], advantages[part], eos, config.updates.branches)
        weights_of, collate = {id(tree): weights for tree, weights in trees}, Collator(pad=eos)
        for rows in batch_by_length([tree for tree, _ in trees], config.updates.batch, random.Random(0)):
            batch = to_device(collate(rows, [[weights_of[id(tree)]] for tree in rows]), model.device)
            (-(batch["weights"] * log_probabilities(model, batch)).sum() / len(trajectories)).backward()
        halves.append(_flat_gradient(model))
    first, second = halves[0], halves[1] - halves[0]
    norm = (
        float(torch.nn.utils.clip_grad_norm_(model.parameters(), config.updates.clip))
        if halves[1].any()
        else 0.0
    )
    if norm:
        optimizer.step()
    return norm, float(torch.cosine_similarity(first, second, dim=0))


def _weighted_trees(
    trajectories: Sequence[Trajectory], advantages: Sequence[float], eos: int, branches: float
) -> list[tuple[TrainingTree, Floats]]:
    """The trees with a loss of nonzero weight, and the weights of their losses."""
    weighted = list[tuple[TrainingTree, Floats]]()
    for trajectory, advantage in zip(trajectories, advantages, strict=True):
        for tree in build_training_tree([trajectory], eos=eos, separate_contexts=True).split():
            in_branch = np.array([bool(trajectory.spans[k].path) for k in tree.spans], dtype=bool)
            weights = (advantage * np.where(in_branch, branches, 1.0)).astype(np.float32)
            if weights.any():
                weighted.append((tree, weights))
    return weighted


def _flat_gradient(model: Any) -> torch.Tensor:
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return torch.cat([part.detach().flatten() for part in parts])


def _advantages(rollouts: Rollouts, rewards: Sequence[float | None]) -> list[float]:
    remaining = iter(rewards)
    groups = [list(islice(remaining, rollouts.group)) for _ in range(rollouts.problems)]
    if rollouts.advantage == "papo":
        return [a for group in papo(groups) for a in group]
    group_advantages = mean_only if rollouts.advantage == "mean" else grpo
    return [a for group in groups for a in group_advantages([r for r in group if r is not None])]


async def load_weights(url: str, path: Path, version: str) -> None:
    """Load a checkpoint into a running server, in place, and drop its cache, which belongs to the old weights.

    The server waits for running requests, but not for trajectories: wait for those first.

    Args:
        url: The server.
        path: The checkpoint.
        version: Name of the new weights.

    Raises:
        EngineError: If the server does not load it.
    """
    body = {"model_path": str(path.resolve()), "weight_version": version, "flush_cache": True}
    try:
        answer = await post_json_async(f"{url}/update_weights_from_disk", body)
    except EngineError as error:
        raise EngineError(f"the server did not load {path}: {error}", error.status) from error
    if not answer.get("success"):
        raise EngineError(f"the server did not load {path}: {answer.get('message', answer)}")


def _step_log(
    step: int,
    attempts: Sequence[Attempt],
    rewards: Sequence[float | None],
    norm: float,
    cosine: float,
    sample_s: float,
    learn_s: float,
) -> GrpoStepLog:
    def mean(values: Sequence[float]) -> float:
        return round(fmean(values), 4) if values else 0.0

    metrics = [a.trajectory.metrics() for a in attempts]
    forked = {
        n: [float(bool(a.trajectory.blocks)) for a in attempts if len(a.problem.numbers) == n] for n in (3, 4)
    }
    versions = {c.weight_version for a in attempts for c in a.trajectory.calls if c.weight_version}
    if len(versions) > 1:
        raise AprError(f"replies of one step came from several weights: {sorted(versions)}")
    return GrpoStepLog(
        step=step,
        weights=next(iter(versions), ""),
        reward=mean([r for r in rewards if r is not None]),
        accuracy=mean([float(a.correct) for a in attempts]),
        total=mean([m.total for m in metrics]),
        critical_path=mean([m.critical_path for m in metrics]),
        forked=mean([float(bool(a.trajectory.blocks)) for a in attempts]),
        forked_3=mean(forked[3]),
        forked_4=mean(forked[4]),
        width=mean([float(len(b.branches)) for a in attempts for b in a.trajectory.blocks]),
        norm=round(norm, 4),
        gradient_cosine=round(cosine, 4),
        sample_s=round(sample_s, 2),
        learn_s=round(learn_s, 2),
    )
