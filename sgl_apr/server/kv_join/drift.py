"""Whether a model bears KV joins: its next tokens behind one, beside those behind a text join; the server is right.

A joined cache has positions and a visibility that an ordinary model never saw in training. So the greedy continuation
of a text join is scored token by token (teacher forcing) behind three prompts of the same text: joined as text, joined
in the cache, and joined as text with the branches in reversed order. What that harmless change does to a model is the
measure of what the KV join does to it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import exp, log
from pathlib import Path
from statistics import fmean
from typing import Literal

from sgl_apr.errors import AprError
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

CONTINUATION_TOKENS = 16  # tokens of a continuation
TOP_TOKENS = 200  # the likeliest tokens that a divergence is over; all others count as one
MIN_DIVERGENCE = 0.05  # nats: what is smaller counts as this, since few tokens are looked at
TOLERATED_RATIO, BROKEN_RATIO = 2.0, 10.0  # divergences, in multiples of that of reversed text
TOLERATED_DISAGREEMENT = 0.1  # by how much less often the likeliest token may be the same
BRANCH_TOKENS, BRANCH_COUNT = 40, 3  # tokens of a branch that the model writes, and how many branches
MIN_PROBABILITY = 1e-12  # for a probability that rounding has made 0

Verdict = Literal["tolerates", "is disturbed by", "breaks under"]


@dataclass(frozen=True, slots=True)
class JoinSample:
    """What stands before a fork, its branches, and what stands behind the join."""

    prefix: str
    branches: tuple[str, ...]
    header: str


BUILTIN_SAMPLES = (
    JoinSample(
        "Question: What should I know before I get a dog?\n\n",
        (
            "Idea 1: A dog needs time. It wants to be walked two or three times a day, in any weather.\n",
            "Idea 2: A dog costs money. Food, a vet and insurance add up to more than a thousand a year.\n",
            "Idea 3: A dog needs training, and most of all in its first year.\n",
        ),
        "\nIn short, before you get a dog,",
    ),
    JoinSample(
        "Question: Anna has 3 bags with 4 apples each, and Ben has 5 apples. How many apples are there?\n\n",
        ("Part 1: Anna has 3 times 4 apples, which is 12.\n", "Part 2: Ben has 5 apples.\n"),
        "\nTogether they have",
    ),
    JoinSample(
        "Compare whales and eagles.\n\n",
        (
            "Whales: They live in the sea, breathe air, and are the largest animals of all.\n",
            "Eagles: They live on cliffs and in tall trees, and hunt from the air with their sharp eyes.\n",
        ),
        "\nWhat both have in common is that",
    ),
    JoinSample(
        "Question: How can a city have less traffic?\n\n",
        (
            "1. Buses and trains that come often, so that nobody has to wait.\n",
            "2. Safe lanes for bicycles.\n",
            "3. A charge for driving into the centre.\n",
            "4. Homes, shops and offices that are close to one another, so that people can walk.\n",
        ),
        "\nThe most important of these is",
    ),
    JoinSample(
        "The detective had two witnesses.\n\n",
        (
            'The gardener said: "I saw a man in a red coat leave the house at nine."\n',
            'The cook said: "At ten the lady was still alive. I brought her tea."\n',
        ),
        "\nFrom what the two had said the detective concluded that the man in the red",
    ),
)


@dataclass(frozen=True, slots=True)
class DistributionShift:
    """How the next tokens of a continuation change: divergence in nats, and how often the likeliest stays."""

    kl: float
    agreement: float


@dataclass(frozen=True, slots=True)
class DriftMeasurement:
    """Of one sample: what the KV join changes, and what reversed branches change, over `steps` tokens."""

    name: str
    steps: int
    kv: DistributionShift
    reversed: DistributionShift


def read_samples(path: Path) -> list[JoinSample | str]:
    """Of a file: JSON lines with prefix, branches and header, and lines of text, which are questions.

    Raises AprError that names the line.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise AprError(f"cannot read {path}: {error}") from None
    found = [_sample(line, f"{path}, line {k}") for k, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise AprError(f"{path} is empty, expected samples or questions")
    return found


def _sample(line: str, where: str) -> JoinSample | str:
    if not line.lstrip().startswith("{"):
        return line.strip()
    try:
        data = json.loads(line)
        sample = JoinSample(data["prefix"], tuple(data["branches"]), data["header"])
    except (ValueError, KeyError, TypeError) as error:
        raise AprError(f'{where}: expected "prefix", "branches" and "header" ({error!r})') from None
    if not all(isinstance(t, str) and t for t in (sample.prefix, sample.header, *sample.branches)):
        raise AprError(f"{where}: expected texts, and none of them empty")
    if isinstance(data["branches"], str) or len(sample.branches) < 2:
        raise AprError(f"{where}: expected a list of two branches or more")
    return sample


def sample_from_model(ask: GenerateClient, tokenizer: Tokenizer, question: str) -> JoinSample:
    """A sample whose branches the served model writes itself, each without seeing the others."""
    prefix = f"Question: {question}\n\n"
    begun = [f"Idea {k}:" for k in range(1, BRANCH_COUNT + 1)]
    prompts = [ProbePrompt(tuple(tokenizer.encode(prefix + b, add_special_tokens=True))) for b in begun]
    sampling = {"temperature": 0.8, "stop": ["\n"], "ignore_eos": False}
    replies = send_prompts(ask, prompts, BRANCH_TOKENS, sampling=sampling)
    texts = [tokenizer.decode([t for t in r.tokens if t not in tokenizer.eos_ids]) for r in replies]
    branches = tuple(f"{b}{t.rstrip()}\n" for b, t in zip(begun, texts, strict=True))
    return JoinSample(prefix, branches, "\nIn conclusion,")


def measure_drift(
    ask: GenerateClient, tokenizer: Tokenizer, sample: JoinSample, steps: int = CONTINUATION_TOKENS
) -> DriftMeasurement:
    """What KV join and reversed branches do to one sample; raises EngineError where the server does not join."""
    prefix = tuple(tokenizer.encode(sample.prefix, add_special_tokens=True))
    branches = [tuple(tokenizer.encode(b)) for b in sample.branches]
    header = tuple(tokenizer.encode(sample.header))
    if not header:
        raise AprError(f"{sample.header!r} has no tokens, expected one at least behind a join")
    ids, turned = ((*prefix, *(i for b in order for i in b), *header) for order in (branches, branches[::-1]))
    before: Layout = (len(prefix), tuple((len(b),) for b in branches))

    text = send_prompts(ask, [ProbePrompt(ids)], steps, top=TOP_TOKENS, sampling={"ignore_eos": False})[0]
    commit_branches(ask, [ProbePrompt(ids, (*before, len(header)))])
    forced = [text.tokens[:k] for k in range(len(text.tokens))]
    scored = send_prompts(
        ask,
        [
            *(ProbePrompt(ids + f, (*before, len(header) + len(f))) for f in forced),
            *(ProbePrompt(turned + f) for f in forced),
        ],
        1,
        top=1,
        tokens=[list(row) for row in text.rows] * 2,
    )

    def shift(replies: Sequence[ProbeReply]) -> DistributionShift:
        return DistributionShift(
            fmean(divergence(row, r.chosen[0]) for row, r in zip(text.rows, replies, strict=True)),
            fmean(t == r.tokens[0] for t, r in zip(text.tokens, replies, strict=True)),
        )

    name = sample.prefix.strip().splitlines()[0]
    return DriftMeasurement(name, len(forced), shift(scored[: len(forced)]), shift(scored[len(forced) :]))


def divergence(reference: LogprobRow, other: LogprobRow) -> float:
    """KL(reference || other) in nats over the tokens of `reference`; all other tokens count as one.

    That is at most the divergence over the whole vocabulary. `other` has to have the same tokens.
    """
    p, q = [[exp(row[i]) for i in reference] for row in (reference, other)]
    pairs = [*zip(p, q, strict=True), (1 - sum(p), 1 - sum(q))]
    return max(0.0, sum(a * log(a / max(b, MIN_PROBABILITY)) for a, b in pairs if a > MIN_PROBABILITY))


def pool_measurements(measured: Iterable[DriftMeasurement]) -> DriftMeasurement:
    """All samples as one, each token counted once."""
    every = list(measured)
    steps = sum(m.steps for m in every)

    def mean(shifts: Sequence[DistributionShift]) -> DistributionShift:
        weights = [m.steps / steps for m in every]
        return DistributionShift(
            sum(w * s.kl for w, s in zip(weights, shifts, strict=True)),
            sum(w * s.agreement for w, s in zip(weights, shifts, strict=True)),
        )

    return DriftMeasurement("all", steps, mean([m.kv for m in every]), mean([m.reversed for m in every]))


def judge_drift(kv: DistributionShift, reversed: DistributionShift) -> Verdict:
    """A model tolerates KV joins if they change it at most twice as much as reversed branches do, and its likeliest
    tokens at most a tenth more often; it breaks if they change it ten times as much, or half of its likeliest
    tokens that reversed branches leave alone."""
    times = kv.kl / max(reversed.kl, MIN_DIVERGENCE)
    if times <= TOLERATED_RATIO and kv.agreement >= reversed.agreement - TOLERATED_DISAGREEMENT:
        return "tolerates"
    if times > BROKEN_RATIO or kv.agreement < reversed.agreement / 2:
        return "breaks under"
    return "is disturbed by"
