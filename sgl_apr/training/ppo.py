"""Policy gradients with importance ratios and clipping (PPO), under the masks that a grammar had when a policy decoded."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sgl_apr.training.batches import batch_by_length
from sgl_apr.training.collate import Collator, select_log_probabilities, target_logits, to_device
from sgl_apr.training.device import collator_for
from sgl_apr.training.grpo_config import Updates
from sgl_apr.training.mask_replay import MaskReplay
from sgl_apr.training.policy_samples import PolicySample

Replies = Sequence[Sequence[PolicySample]]  # the samples of each reply


@dataclass(frozen=True, slots=True)
class UpdateStatistics:
    """The gradient steps on the replies of one step; 0 where no reply has an advantage.

    Attributes:
        norm: Mean norm of the gradients before clipping.
        gradient_cosine: Mean cosine between the gradients of the two halves of a minibatch, which shows how much of them is not
            noise.
        logprob_error: Largest difference of a log-probability from the server's, before the first gradient step.
        clipped: Share of tokens whose ratio is clipped.
        kl: Mean estimate of KL(old, new) per token, `ratio - 1 - log ratio`.
    """

    norm: float = 0.0
    gradient_cosine: float = 0.0
    logprob_error: float = 0.0
    clipped: float = 0.0
    kl: float = 0.0


def policy_log_probabilities(
    model: Any, batch: dict[str, Any], replay: MaskReplay, temperature: float
) -> Tensor:
    """The log-probability of every target of a batch, (m,), as an engine has it: under its mask, at a temperature.

    Args:
        model: A Hugging Face causal language model.
        batch: A batch of a `Collator`, with the number of its mask for each target in `masks`, (m,).
        replay: The masks.
        temperature: The temperature.
    """
    logits = target_logits(model, batch) / temperature
    logits = logits.masked_fill(~replay.allowed_tokens(batch["masks"]), -torch.inf)
    return select_log_probabilities(logits, batch["targets"])


def clipped_surrogate(log_ratios: Tensor, advantages: Tensor, clip_ratio: float) -> Tensor:
    """PPO's clipped objective of each token (Schulman 2017, arXiv 1707.06347, equation 7), (m,).

    Examples:
        >>> clipped_surrogate(torch.tensor([0.0, 1.0, 1.0]), torch.tensor([2.0, 2.0, -2.0]), 0.2)
        tensor([ 2.0000,  2.4000, -5.4366])
    """
    ratios = log_ratios.exp()
    return torch.minimum(ratios * advantages, ratios.clamp(1 - clip_ratio, 1 + clip_ratio) * advantages)


def update_policy(
    model: Any,
    optimizer: torch.optim.Optimizer,
    groups: Sequence[Replies],
    replay: MaskReplay,
    updates: Updates,
    *,
    temperature: float,
    seed: int = 0,
) -> UpdateStatistics:
    """Learn from the replies of one step, in `updates.epochs` times `updates.minibatches` gradient steps.

    The loss sums the clipped objective over the tokens of a reply, and averages over replies. It does not divide by length (Dr.
    GRPO: Liu 2025, arXiv 2503.20783, section 3), and has no KL term. In the first gradient step all ratios are 1, and it is the plain policy
    gradient.

    Args:
        model: The policy.
        optimizer: Changes it.
        groups: The samples of the replies to each problem.
        replay: The masks of the samples.
        updates: How to learn.
        temperature: The temperature of the replies.
        seed: Seed of the order of minibatches.
    """
    model.eval()  # without dropout, which would change the ratios
    collate = collator_for(model, replay.eos)
    rng = random.Random(f"{updates.seed} {seed}")
    steps, tokens, first_error = list[tuple[float, float]](), list[Tensor](), 0.0
    for _ in range(updates.epochs):
        order = list(groups) if updates.minibatches == 1 else rng.sample(groups, len(groups))
        for k in range(updates.minibatches):
            minibatch = order[k :: updates.minibatches]
            optimizer.zero_grad(set_to_none=True)
            half, replies = len(minibatch) // 2, sum(map(len, minibatch))
            gradients = list[Tensor]()
            for part in (minibatch[:half], minibatch[half:]):
                samples = [sample for group in part for reply in group for sample in reply]
                for rows in _batches(samples, updates.batch):
                    batch = to_device(collate_samples(rows, collate), model.device)
                    values = policy_log_probabilities(model, batch, replay, temperature)
                    log_ratios = values - batch["old_logprobs"]
                    objective = clipped_surrogate(log_ratios, batch["weights"], updates.clip_ratio)
                    (-objective.sum() / replies).backward()
                    tokens.append(log_ratios.detach())
                    if not any(norm for norm, _ in steps):
                        first_error = max(first_error, float(log_ratios.detach().abs().max()))
                gradients.append(_flat_gradient(model))
            steps.append(_step(model, optimizer, gradients, updates.clip))
    if not tokens:
        return UpdateStatistics()
    log_ratios = torch.cat(tokens)
    ratios = log_ratios.exp()
    return UpdateStatistics(
        norm=fmean(norm for norm, _ in steps),
        gradient_cosine=fmean(cosine for _, cosine in steps),
        logprob_error=first_error,
        clipped=float(((ratios - 1).abs() > updates.clip_ratio).float().mean()),
        kl=float((ratios - 1 - log_ratios).mean()),
    )


def _batches(samples: Sequence[PolicySample], max_tokens: int) -> list[list[PolicySample]]:
    by_tree = {id(sample.tree): sample for sample in samples}
    batches = batch_by_length([sample.tree for sample in samples], max_tokens, random.Random(0))
    return [[by_tree[id(tree)] for tree in rows] for rows in batches]


def collate_samples(rows: Sequence[PolicySample], collate: Collator) -> dict[str, Any]:
    """Collate samples, one in each row, with their advantages as `weights`, `old_logprobs` and `masks`, all (m,)."""
    batch = collate([row.tree for row in rows], [[row.advantages] for row in rows])
    batch["old_logprobs"] = torch.from_numpy(np.concatenate([row.old_logprobs for row in rows]))
    batch["masks"] = torch.from_numpy(np.concatenate([row.masks for row in rows]))
    return batch


def _step(
    model: Any, optimizer: torch.optim.Optimizer, gradients: Sequence[Tensor], clip: float
) -> tuple[float, float]:
    """One step of the optimizer. Returns the norm of the gradient, and the cosine between those of its halves."""
    first, second = gradients[0], gradients[1] - gradients[0]
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), clip)) if gradients[1].any() else 0.0
    if norm:
        optimizer.step()
    return norm, float(torch.cosine_similarity(first, second, dim=0))


def _flat_gradient(model: Any) -> Tensor:
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return torch.cat([part.detach().flatten() for part in parts])
