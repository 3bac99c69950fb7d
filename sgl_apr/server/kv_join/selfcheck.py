"""Checks that a server joins in its KV cache as its model would, by identities that hold for any model.

The checks send random tokens to `/generate`:

- *one branch*: the join of one branch, also a nested one, equals the ordinary prompt of the same tokens.
- *empty branch*: a branch without tokens changes nothing.
- *order*: attention does not depend on the order of keys, so branches may be swapped, also nested ones.
- *decoding*: tokens decoded after a join have the same log-probabilities as the same tokens in the prompt.
- *reuse*: only the tokens after the join of a joined prompt are computed again.
- *positions*: the identities above would also hold if the tokens after a join had positions that are too high. So a
  branch is joined with k - 1 copies of itself. The next token then has the position right after the first copy, and
  attends to each key of the branch k times. Its own key is the only one that it attends to once, so its
  log-probabilities are a smooth function of 1/k, close to a straight line. For k = 1 the prompt is an ordinary one.
  The log-probabilities for k = 1, 3, 4 therefore predict those for k = 2.

The same is measured on text, where branches attend to one another. Text has to miss an identity by more than is
allowed, or the model cannot show whether the identity holds (`IdentityCheck.is_uninformative`). Position errors that
are the same for any number of branches are not detected. The tests compare with a forward pass of transformers for
that.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, prod
from statistics import fmean

from sgl_apr.engine.sglang_names import CACHE_MISS_STATUS
from sgl_apr.errors import EngineError, LaunchError
from sgl_apr.server.kv_join.probe import (
    GenerateClient,
    LogprobRow,
    ProbePrompt,
    ProbeReply,
    commit_branches,
    send_prompts,
)
from sgl_apr.trajectory.join_layout import token_count

Ids = tuple[int, ...]

PROBE_TOKEN_IDS = range(128, 256)  # ordinary tokens in any vocabulary
DECODED_TOKENS = 4  # tokens decoded after a join
COPIED_TOKENS, COPIED_BRANCHES = 16, 3  # tokens of a branch that is copied, and how many such branches
MIN_TOLERANCE, MAX_TOLERANCE = 1e-3, 0.5  # nats: bounds of the tolerance, however exact or noisy a server is
NOISE_FACTOR = 5.0  # the tolerance between them, as a multiple of the difference between ordinary prompts
CURVATURE_TOLERANCE = 0.25  # for copies: the tolerance as a share of the curvature of text
MAX_TRIES = 3  # committed branches can be lost when other clients use the cache


@dataclass(frozen=True, slots=True)
class IdentityCheck:
    """The result for one identity.

    Attributes:
        name: The identity.
        error: By how much it is missed, in nats, averaged over the log-probabilities of the likeliest tokens. For
            "reuse", in tokens.
        allowed: The largest error that passes.
        text_error: The error of the same tokens as text. inf if it does not apply.
    """

    name: str
    error: float
    allowed: float
    text_error: float = inf

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed

    @property
    def is_uninformative(self) -> bool:
        """Whether a server that reads everything as text would pass too."""
        return self.text_error <= self.allowed

    def __str__(self) -> str:
        text = f"{self.name}: off by {self.error:.2g}, allowed {self.allowed:.2g}"
        return f"{text} (as text {self.text_error:.2g})" if self.text_error < inf else text


def check_identities(client: GenerateClient, seed: int | None = None) -> list[IdentityCheck]:
    """Check every identity on a server, with some 50 prompts of at most 65 tokens.

    Args:
        client: Sends requests to the server.
        seed: Chooses the tokens. Those of an earlier check with the same seed are cached already.

    Returns:
        One result for each identity, also for those that do not hold.

    Raises:
        EngineError: The server does not join.
    """
    rng = random.Random(seed)
    for tries in range(1, MAX_TRIES + 1):
        try:
            return _check_once(client, rng)
        except EngineError as error:
            if error.status != CACHE_MISS_STATUS or tries == MAX_TRIES:
                raise
    raise AssertionError("unreachable")


def assert_joins_correct(client: GenerateClient) -> None:
    """Check that every identity holds on a server, in at least one of `MAX_TRIES` checks.

    A server that joins wrongly does so with any tokens. But for some tokens, a small model that was trained on few
    others is so far from smooth that an identity seems not to hold.

    Args:
        client: Sends requests to the server.

    Raises:
        LaunchError: An identity never held. The message says how to serve without joins.
    """
    failures: dict[str, str] = {}
    try:
        for tries in range(MAX_TRIES):
            failed = {c.name: str(c) for c in check_identities(client) if not c.ok}
            failures = failed if tries == 0 else {n: text for n, text in failed.items() if n in failures}
            if not failures:
                return
    except EngineError as error:
        failures = {"": str(error)}
    raise LaunchError(
        f"the KV joins of this server do not match its model ({'; '.join(failures.values())}). "
        "Serve with --radix-cache-backend stock: branches are then joined as text"
    )


def _check_once(client: GenerateClient, rng: random.Random) -> list[IdentityCheck]:
    def draw(tokens: int) -> Ids:
        return tuple(rng.choice(PROBE_TOKEN_IDS) for _ in range(tokens))

    p, a, b, c, d, e, h = map(draw, (8, 7, 3, 2, 4, 2, 3))
    ordinary = [ProbePrompt(ids) for ids in (p + a + b + h, p + b + a + h, p + a + h, p + a + c + e + h)]
    joins = [
        ProbePrompt(p + a + b + h, (8, ((7,), (3,)), 3)),
        ProbePrompt(p + b + a + h, (8, ((3,), (7,)), 3)),
        ProbePrompt(p + a + b + h, (8, ((7,), (0,), (3,)), 3)),
        ProbePrompt(p + a + h, (8, ((7,),), 3)),
        ProbePrompt(p + a + c + e + h, (8, ((7, ((2,),), 2),), 3)),
        ProbePrompt(p + a + c + d + e + b + h, (8, ((7, ((2,), (4,)), 2), (3,)), 3)),
        ProbePrompt(p + b + a + d + c + e + h, (8, ((3,), (7, ((4,), (2,)), 2)), 3)),
    ]
    first = send_prompts(client, ordinary, DECODED_TOKENS)
    commit_branches(client, joins)
    text = send_prompts(client, ordinary, DECODED_TOKENS)
    joined = send_prompts(client, joins, DECODED_TOKENS)
    ab, ba, empty, single, single_nested, nested, nested_ba = joined
    extended = [_extend_prompt(joins[0], ab.tokens[:k]) for k in range(1, DECODED_TOKENS)]
    prefilled = send_prompts(client, extended, 1)

    noise = max(map(reply_distance, first, text))
    allowed = min(MAX_TOLERANCE, max(MIN_TOLERANCE, NOISE_FACTOR * noise))
    one_branch = max(reply_distance(single, text[2]), reply_distance(single_nested, text[3]))
    order = max(reply_distance(ab, ba), reply_distance(nested, nested_ba))
    decoding = max(mean_logprob_difference(ab.rows[k], r.rows[0]) for k, r in enumerate(prefilled, 1))
    return [
        IdentityCheck("one branch", one_branch, allowed),
        IdentityCheck("empty branch", reply_distance(empty, ab), allowed),
        IdentityCheck("order", order, allowed, reply_distance(*text[:2])),
        IdentityCheck("decoding", decoding, allowed),
        IdentityCheck("reuse", max(map(_recomputed_tokens, joins, joined)), 0),
        _check_positions(client, [(draw(COPIED_TOKENS), draw(1)) for _ in range(COPIED_BRANCHES)], allowed),
    ]


def _check_positions(
    client: GenerateClient, branches: Sequence[tuple[Ids, Ids]], allowed: float
) -> IdentityCheck:
    """Check the positions on average over several branches, because a single one may show little.

    Args:
        client: Sends requests to the server.
        branches: (the branch, the tokens after it).
        allowed: The largest error that passes, at least.
    """
    ordinary = [ProbePrompt(branch + tail) for branch, tail in branches]
    copies = range(2, 5)
    text = [ProbePrompt(branch * k + tail) for branch, tail in branches for k in copies]
    joins = [
        ProbePrompt(branch * k + tail, (0, ((COPIED_TOKENS,),) * k, 1))
        for branch, tail in branches
        for k in copies
    ]
    single = [r.rows[0] for r in send_prompts(client, ordinary, 1)]
    commit_branches(client, joins)
    tokens = [list(row) for row in single for _ in copies]
    rows = [r.chosen[0] for r in send_prompts(client, [*text, *joins], 1, tokens=tokens * 2)]

    def mean_curvature(copied: Sequence[LogprobRow]) -> float:
        n = len(copies)
        return fmean(_curvature(row, *copied[n * k : n * k + n]) for k, row in enumerate(single))

    as_text, as_join = mean_curvature(rows[: len(text)]), mean_curvature(rows[len(text) :])
    return IdentityCheck("positions", as_join, max(allowed, CURVATURE_TOLERANCE * as_text), as_text)


def reply_distance(left: ProbeReply, right: ProbeReply) -> float:
    """Return the mean difference of the log-probabilities of two replies, up to the step where their tokens differ."""
    pairs = zip(left.tokens, right.tokens, strict=False)
    compared = next((k for k, (a, b) in enumerate(pairs, 1) if a != b), None)
    return fmean(map(mean_logprob_difference, left.rows[:compared], right.rows[:compared]))


def mean_logprob_difference(left: LogprobRow, right: LogprobRow) -> float:
    """Return the mean difference of the log-probabilities of two rows, in nats.

    A token that only one row has is at most as likely in the other as the least likely token there.
    """

    def differences(a: LogprobRow, b: LogprobRow) -> list[float]:
        lowest = min(b.values())
        return [max(p - lowest, 0.0) if i not in b else abs(p - b[i]) for i, p in a.items()]

    return fmean(differences(left, right) + differences(right, left))


def _curvature(one: LogprobRow, two: LogprobRow, three: LogprobRow, four: LogprobRow) -> float:
    """Return the mean distance of the log-probabilities for k = 2 from the parabola in 1/k through k = 1, 3, 4."""
    nodes = {1.0: one, 1 / 3: three, 1 / 4: four}
    weights = {
        u: prod((0.5 - v) / (u - v) for v in nodes if v != u) for u in nodes
    }  # Lagrange polynomials at 1/2
    return fmean(abs(sum(w * nodes[u][i] for u, w in weights.items()) - p) for i, p in two.items())


def _recomputed_tokens(prompt: ProbePrompt, reply: ProbeReply) -> int:
    """Return how many tokens before the end of the last join were computed again."""
    assert prompt.layout is not None
    *before, _ = prompt.layout
    return max(0, token_count(before) - reply.cached)


def _extend_prompt(prompt: ProbePrompt, tokens: tuple[int, ...]) -> ProbePrompt:
    assert prompt.layout is not None
    *before, run = prompt.layout
    assert isinstance(run, int)
    return ProbePrompt(prompt.ids + tokens, (*before, run + len(tokens)))
