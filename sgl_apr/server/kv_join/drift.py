"""Measures how a model tolerates KV joins: how its next tokens after a KV join differ from those after a text join.

`selfcheck` tests whether a server computes joins correctly. This module tests the model: a joined cache has positions
and an attention pattern that an ordinary model never saw in training. The greedy continuation of a text join is scored
token by token (teacher forcing) after three prompts of the same text: joined as text, joined in the cache, and joined
as text with the branches in reversed order. Reversing the branches is a harmless change. Its effect on the model is
the unit for the effect of the KV join.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import exp, log
from statistics import fmean
from typing import Literal

from sgl_apr.errors import AprError
from sgl_apr.server.kv_join.drift_samples import JoinSample
from sgl_apr.server.kv_join.probe import (
    GenerateClient,
    LogprobRow,
    ProbePrompt,
    ProbeReply,
    commit_branches,
    send_prompts,
)
from sgl_apr.tokenizer import Tokenizer
from sgl_apr.trajectory.join_layout import Layout

CONTINUATION_TOKENS = 16
TOP_TOKENS = 200  # a divergence is over this many of the likeliest tokens; all others count as one
MIN_DIVERGENCE = 0.05  # nats: smaller divergences count as this, because they are measured on few tokens
TOLERATED_RATIO, BROKEN_RATIO = 2.0, 10.0  # divergences, as multiples of that of reversed text
TOLERATED_DISAGREEMENT = 0.1  # by how much less often the likeliest token may stay the same
BRANCH_TOKENS, BRANCH_COUNT = (
    40,
    3,
)  # tokens of a branch that the model writes, and how many branches it writes
MIN_PROBABILITY = 1e-12  # replaces a probability that rounding has made 0

Verdict = Literal["tolerates", "is disturbed by", "breaks under"]


@dataclass(frozen=True, slots=True)
class DistributionShift:
    """How the next tokens of a continuation change.

    Attributes:
        kl: The mean KL divergence, in nats.
        agreement: How often the likeliest token stays the same, as a share.
    """

    kl: float
    agreement: float


@dataclass(frozen=True, slots=True)
class DriftMeasurement:
    """The measurement of one sample.

    Attributes:
        name: The first line of the sample's prefix.
        steps: Tokens of the continuation.
        kv: What the KV join changes.
        reversed: What reversed branches change.
    """

    name: str
    steps: int
    kv: DistributionShift
    reversed: DistributionShift


def sample_from_model(client: GenerateClient, tokenizer: Tokenizer, question: str) -> JoinSample:
    """Return a sample whose branches the served model writes, each without seeing the others.

    Raises:
        EngineError: The server did not answer.
    """
    prefix = f"Question: {question}\n\n"
    headers = [f"Idea {k}:" for k in range(1, BRANCH_COUNT + 1)]
    prompts = [ProbePrompt(tuple(tokenizer.encode(prefix + h, add_special_tokens=True))) for h in headers]
    sampling = {"temperature": 0.8, "stop": ["\n"], "ignore_eos": False}
    replies = send_prompts(client, prompts, BRANCH_TOKENS, sampling=sampling)
    texts = [tokenizer.decode([t for t in r.tokens if t not in tokenizer.eos_ids]) for r in replies]
    branches = tuple(f"{header}{text.rstrip()}\n" for header, text in zip(headers, texts, strict=True))
    return JoinSample(prefix, branches, "\nIn conclusion,")


def measure_drift(
    client: GenerateClient, tokenizer: Tokenizer, sample: JoinSample, steps: int = CONTINUATION_TOKENS
) -> DriftMeasurement:
    """Measure what the KV join and reversed branches do to one sample.

    Args:
        client: Sends requests to the server.
        tokenizer: The model's tokenizer.
        sample: The sample.
        steps: Tokens of the continuation, at most.

    Raises:
        EngineError: The server does not join in its cache.
        AprError: The header of the sample has no tokens.
    """
    prefix = tuple(tokenizer.encode(sample.prefix, add_special_tokens=True))
    branches = [tuple(tokenizer.encode(b)) for b in sample.branches]
    header = tuple(tokenizer.encode(sample.header))
    if not header:
        raise AprError(f"{sample.header!r} has no tokens, expected at least one after a join")
    ids, reversed_ids = (
        (*prefix, *(i for branch in order for i in branch), *header) for order in (branches, branches[::-1])
    )
    before: Layout = (len(prefix), tuple((len(b),) for b in branches))

    sampling = {"ignore_eos": False}
    text = send_prompts(client, [ProbePrompt(ids)], steps, top=TOP_TOKENS, sampling=sampling)[0]
    commit_branches(client, [ProbePrompt(ids, (*before, len(header)))])
    forced = [text.tokens[:k] for k in range(len(text.tokens))]
    joined_prompts = [ProbePrompt(ids + f, (*before, len(header) + len(f))) for f in forced]
    reversed_prompts = [ProbePrompt(reversed_ids + f) for f in forced]
    tokens = [list(row) for row in text.rows] * 2
    replies = send_prompts(client, [*joined_prompts, *reversed_prompts], 1, top=1, tokens=tokens)

    def shift(replies: Sequence[ProbeReply]) -> DistributionShift:
        return DistributionShift(
            fmean(divergence(row, r.chosen[0]) for row, r in zip(text.rows, replies, strict=True)),
            fmean(t == r.tokens[0] for t, r in zip(text.tokens, replies, strict=True)),
        )

    name = sample.prefix.strip().splitlines()[0]
    return DriftMeasurement(name, len(forced), shift(replies[: len(forced)]), shift(replies[len(forced) :]))


def divergence(reference: LogprobRow, other: LogprobRow) -> float:
    """Return KL(reference || other) in nats, over the tokens of `reference`. All other tokens count as one.

    That is at most the divergence over the whole vocabulary.

    Args:
        reference: A row of log-probabilities.
        other: Another row, with the same tokens.
    """
    p, q = [[exp(row[i]) for i in reference] for row in (reference, other)]
    pairs = [*zip(p, q, strict=True), (1 - sum(p), 1 - sum(q))]
    return max(0.0, sum(a * log(a / max(b, MIN_PROBABILITY)) for a, b in pairs if a > MIN_PROBABILITY))


def pool_measurements(measurements: Iterable[DriftMeasurement]) -> DriftMeasurement:
    """Return all measurements as one, in which every token has the same weight."""
    samples = list(measurements)
    steps = sum(m.steps for m in samples)

    def mean(shifts: Sequence[DistributionShift]) -> DistributionShift:
        weights = [m.steps / steps for m in samples]
        return DistributionShift(
            sum(w * s.kl for w, s in zip(weights, shifts, strict=True)),
            sum(w * s.agreement for w, s in zip(weights, shifts, strict=True)),
        )

    return DriftMeasurement("all", steps, mean([m.kv for m in samples]), mean([m.reversed for m in samples]))


def judge_drift(kv: DistributionShift, reversed: DistributionShift) -> Verdict:
    """Judge what KV joins do to a model by what reversed branches do to it.

    A model tolerates KV joins if their divergence is at most twice that of reversed branches, and the likeliest token
    stays the same at most a tenth less often. It breaks under them if the divergence is more than ten times as large,
    or if the likeliest token stays the same less than half as often.

    Args:
        kv: What KV joins change.
        reversed: What reversed branches change.
    """
    ratio = kv.kl / max(reversed.kl, MIN_DIVERGENCE)
    if ratio <= TOLERATED_RATIO and kv.agreement >= reversed.agreement - TOLERATED_DISAGREEMENT:
        return "tolerates"
    if ratio > BROKEN_RATIO or kv.agreement < reversed.agreement / 2:
        return "breaks under"
    return "is disturbed by"
