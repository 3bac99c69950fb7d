"""Whether a server joins in its KV cache as the model would: identities that hold for any model; no second model.

They are checked with random tokens over `/generate`:

- *one branch*: the join of one branch, nested ones too, is the ordinary prompt of the same tokens;
- *empty branch*: a branch without tokens changes nothing;
- *order*: attention does not know the order of keys, so branches may be swapped, nested ones too;
- *decoding*: what is decoded behind a join is what is read there, if the same tokens come with the prompt;
- *reuse*: nothing of a joined prompt is computed again but what stands behind the join;
- *positions*: all that would also hold if the tokens behind a join stood too far away. So a branch is joined with
  k - 1 copies of itself: what follows stands right behind the first one, and sees each of its keys k times. As its
  own key is the only one that it sees once, its log-probabilities are a smooth function of 1/k, nearly a straight
  line, and for k = 1 the prompt is an ordinary one: those for k = 1, 3, 4 tell what those for k = 2 are.

The same is measured over text, where branches read one another: it has to miss an identity by more than is allowed,
else a model does not show what the identity says (`Check.blind`). Displacements that are the same for any number of
branches are not seen; the tests have a transformers forward for them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, prod
from statistics import fmean

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
DECODED_TOKENS = 4  # tokens decoded behind a join
COPIED_TOKENS, COPIED_BRANCHES = 16, 3  # tokens of a branch that is copied, and how many such branches
MIN_TOLERANCE, MAX_TOLERANCE = 1e-3, 0.5  # nats: what is allowed however exact a server is, and however noisy
NOISE_FACTOR = 5.0  # what is allowed in between, in multiples of what ordinary prompts differ by
CURVATURE_TOLERANCE = 0.25  # for copies: what is allowed of the bend that text has
LOST, MAX_TRIES = (
    409,
    3,
)  # what was committed is gone: others are using the cache; how often it is tried again


@dataclass(frozen=True, slots=True)
class IdentityCheck:
    """One identity: by how much it is missed, how much is allowed, and by how much text misses it.

    In nats, on the average of the likeliest tokens' log-probabilities; for "reuse" in tokens. `text` is inf where the same tokens
    as text say nothing.
    """

    name: str
    error: float
    allowed: float
    text: float = inf

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed

    @property
    def is_uninformative(self) -> bool:
        """Whether a server that reads everything as text would have passed."""
        return self.text <= self.allowed

    def __str__(self) -> str:
        found = f"{self.name}: off by {self.error:.2g}, allowed {self.allowed:.2g}"
        return f"{found} (as text {self.text:.2g})" if self.text < inf else found


def check_identities(ask: GenerateClient, seed: int | None = None) -> list[IdentityCheck]:
    """Every identity on the server behind `ask`, by some 50 prompts of at most 65 tokens; nothing is raised
    for one that is missed. `seed` says which tokens are used: those of an earlier check are cached already.
    Raises EngineError where the server refuses to join.
    """
    rng = random.Random(seed)
    for tries in range(1, MAX_TRIES + 1):
        try:
            return _check_once(ask, rng)
        except EngineError as error:
            if error.status != LOST or tries == MAX_TRIES:
                raise
    raise AssertionError("unreachable")


def assert_joins_correct(ask: GenerateClient) -> None:
    """Raises LaunchError, which says how to serve without joins, unless every identity holds, for some tokens at least.

    What a server does wrong it does wrong with any tokens. But there are some for which a small model that was trained
    on few others is so far from smooth that it seems to.
    """
    missed: dict[str, str] = {}
    try:
        for tries in range(MAX_TRIES):
            found = {c.name: str(c) for c in check_identities(ask) if not c.ok}
            missed = found if tries == 0 else {name: said for name, said in found.items() if name in missed}
            if not missed:
                return
    except EngineError as error:
        missed = {"": str(error)}
    raise LaunchError(
        f"the KV joins of this server are not what its model computes, or none ({'; '.join(missed.values())}): "
        "with --radix-cache-backend stock it serves, and branches are joined as text"
    )


def _check_once(ask: GenerateClient, rng: random.Random) -> list[IdentityCheck]:
    def draw(tokens: int) -> Ids:
        return tuple(rng.choice(PROBE_TOKEN_IDS) for _ in range(tokens))

    p, a, b, c, d, e, h = map(draw, (8, 7, 3, 2, 4, 2, 3))
    lines = [ProbePrompt(ids) for ids in (p + a + b + h, p + b + a + h, p + a + h, p + a + c + e + h)]
    joins = [
        ProbePrompt(p + a + b + h, (8, ((7,), (3,)), 3)),
        ProbePrompt(p + b + a + h, (8, ((3,), (7,)), 3)),
        ProbePrompt(p + a + b + h, (8, ((7,), (0,), (3,)), 3)),
        ProbePrompt(p + a + h, (8, ((7,),), 3)),
        ProbePrompt(p + a + c + e + h, (8, ((7, ((2,),), 2),), 3)),
        ProbePrompt(p + a + c + d + e + b + h, (8, ((7, ((2,), (4,)), 2), (3,)), 3)),
        ProbePrompt(p + b + a + d + c + e + h, (8, ((3,), (7, ((4,), (2,)), 2)), 3)),
    ]
    fresh = send_prompts(ask, lines, DECODED_TOKENS)
    commit_branches(ask, joins)
    line = send_prompts(ask, lines, DECODED_TOKENS)
    joined = send_prompts(ask, joins, DECODED_TOKENS)
    ab, ba, empty, one, one_nested, nested, nested_ba = joined
    read = send_prompts(ask, [_extend_prompt(joins[0], ab.tokens[:k]) for k in range(1, DECODED_TOKENS)], 1)

    noise = max(map(reply_distance, fresh, line))
    allowed = min(MAX_TOLERANCE, max(MIN_TOLERANCE, NOISE_FACTOR * noise))
    return [
        IdentityCheck(
            "one branch", max(reply_distance(one, line[2]), reply_distance(one_nested, line[3])), allowed
        ),
        IdentityCheck("empty branch", reply_distance(empty, ab), allowed),
        IdentityCheck(
            "order",
            max(reply_distance(ab, ba), reply_distance(nested, nested_ba)),
            allowed,
            reply_distance(*line[:2]),
        ),
        IdentityCheck(
            "decoding",
            max(mean_logprob_difference(ab.rows[k], r.rows[0]) for k, r in enumerate(read, 1)),
            allowed,
        ),
        IdentityCheck("reuse", max(map(_recomputed_tokens, joins, joined)), 0),
        _positions(ask, [(draw(COPIED_TOKENS), draw(1)) for _ in range(COPIED_BRANCHES)], allowed),
    ]


def _positions(ask: GenerateClient, stacks: Sequence[tuple[Ids, Ids]], allowed: float) -> IdentityCheck:
    """On the average of several branches, each with what follows it: a single one may show little."""
    ordinary = [ProbePrompt(branch + tail) for branch, tail in stacks]
    more = range(2, 5)
    text = [ProbePrompt(branch * k + tail) for branch, tail in stacks for k in more]
    joins = [
        ProbePrompt(branch * k + tail, (0, ((COPIED_TOKENS,),) * k, 1))
        for branch, tail in stacks
        for k in more
    ]
    ones = [r.rows[0] for r in send_prompts(ask, ordinary, 1)]
    commit_branches(ask, joins)
    wanted = [list(row) for row in ones for _ in more]
    rows = [r.chosen[0] for r in send_prompts(ask, [*text, *joins], 1, tokens=wanted * 2)]

    def bend(of: Sequence[LogprobRow]) -> float:
        n = len(more)
        return fmean(_curvature(one, *of[n * k : n * k + n]) for k, one in enumerate(ones))

    as_text = bend(rows[: len(text)])
    return IdentityCheck(
        "positions", bend(rows[len(text) :]), max(allowed, CURVATURE_TOLERANCE * as_text), as_text
    )


def reply_distance(one: ProbeReply, two: ProbeReply) -> float:
    """How far the log-probabilities of two replies are apart, on the average of the steps up to where they part."""
    parted = (k for k, (a, b) in enumerate(zip(one.tokens, two.tokens, strict=False), 1) if a != b)
    steps = slice(next(parted, None))
    return fmean(map(mean_logprob_difference, one.rows[steps], two.rows[steps]))


def mean_logprob_difference(one: LogprobRow, two: LogprobRow) -> float:
    """The average difference of a token's log-probabilities, as far as two rows tell: one that only one of them
    has is no likelier in the other than the least likely one there."""

    def beyond(a: LogprobRow, b: LogprobRow) -> list[float]:
        least = min(b.values())
        return [max(p - least, 0.0) if i not in b else abs(p - b[i]) for i, p in a.items()]

    return fmean(beyond(one, two) + beyond(two, one))


def _curvature(one: LogprobRow, two: LogprobRow, three: LogprobRow, four: LogprobRow) -> float:
    """How far log-probabilities for k = 2 are from the parabola in 1/k through those for k = 1, 3, 4, on average."""
    nodes = {1.0: one, 1 / 3: three, 1 / 4: four}
    weights = {u: prod((0.5 - v) / (u - v) for v in nodes if v != u) for u in nodes}  # Lagrange's
    return fmean(abs(sum(w * nodes[u][i] for u, w in weights.items()) - p) for i, p in two.items())


def _recomputed_tokens(prompt: ProbePrompt, reply: ProbeReply) -> int:
    """How many tokens before the last join were computed again."""
    assert prompt.layout is not None
    *before, _ = prompt.layout
    return max(0, token_count(before) - reply.cached)


def _extend_prompt(prompt: ProbePrompt, tokens: tuple[int, ...]) -> ProbePrompt:
    assert prompt.layout is not None
    *before, run = prompt.layout
    assert isinstance(run, int)
    return ProbePrompt(prompt.ids + tokens, (*before, run + len(tokens)))
