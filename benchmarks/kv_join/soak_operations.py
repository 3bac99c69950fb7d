"""The random operations of the soak: forks, joins, aborts and malformed requests, with checks of their answers."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, Literal

import aiohttp

from sgl_apr.trajectory.join_layout import Layout, commit_prompts, extend_layout, join_branches

MAX_PROMPT_TOKENS = 400  # longer sequences are forgotten
VOCABULARY = range(10, 400)


@dataclass(frozen=True, slots=True)
class SoakSequence:
    """A sequence whose tokens are or were in the cache.

    Attributes:
        ids: Token ids.
        joined: The layout of the part that was joined, without its tail; empty for a linear sequence.
    """

    ids: tuple[int, ...]
    joined: Layout = ()

    def extended(self, more: Sequence[int]) -> SoakSequence:
        return SoakSequence((*self.ids, *more), self.joined)


@dataclass(slots=True)
class Fork:
    """A trunk and the branches that were decoded after it."""

    trunk: SoakSequence
    branches: list[SoakSequence]

    def joined(self) -> SoakSequence:
        """The trunk and all branches as one joined sequence."""
        trunk = self.trunk
        layout = join_branches(trunk.joined, len(trunk.ids), [(b.joined, len(b.ids)) for b in self.branches])
        assert layout is not None, "every branch begins with its trunk"
        return SoakSequence(trunk.ids + sum((b.ids[len(trunk.ids) :] for b in self.branches), ()), layout)


@dataclass(frozen=True, slots=True)
class Answer:
    """The greedy answer to a sequence.

    Attributes:
        sequence: The prompt.
        ids: The decoded token ids.
        cached: Tokens of the prompt that were found in the cache.
    """

    sequence: SoakSequence
    ids: tuple[int, ...]
    cached: int


@dataclass(frozen=True, slots=True)
class GroupAnswer:
    """A group of workers, and what they have decoded greedily.

    Attributes:
        kind: "group_think" or "hogwild".
        prompt: Token ids that all workers have in common.
        headers: For each worker, the ids before it decodes.
        limits: For each worker, how many tokens to decode.
        outputs: For each worker, the decoded ids; empty before it is sent.
        position_range: Positions of each worker (Group Think).
        step_end: Text that ends a block (Hogwild!).
    """

    kind: Literal["group_think", "hogwild"]
    prompt: tuple[int, ...]
    headers: tuple[tuple[int, ...], ...]
    limits: tuple[int, ...]
    outputs: tuple[tuple[int, ...], ...]
    position_range: int
    step_end: str | None


class NotCached(Exception):
    """The server answered 409: a branch to join is not in the cache."""


class GroupEnded(Exception):
    """The server answered 503: a group of workers had to make room for other requests."""


class Violation(Exception):
    """The server did what no server may do."""


@dataclass(slots=True)
class Soak:
    """The state that operations share, and their results.

    Attributes:
        session: Sends requests.
        url: The address of the server.
        sequences: Sequences that can be continued or forked.
        forks: Forks that can be joined.
        unread: Joined sequences that were never sent as linear prompts.
        linear: Linear prompts that were sent.
        answers: All answers to linear and joined prompts.
        groups: All groups of workers that have decoded to the end.
        has_pages: Whether the cache has pages of several tokens, with which the server runs no groups.
        outcomes: How often each operation ended how.
        violations: What the server did wrong.
        marks: Operations started, wall seconds, and processor seconds of the server, at each fifth of the run.
        computed_tokens: Tokens that were not found in the cache.
    """

    session: aiohttp.ClientSession
    url: str
    sequences: deque[SoakSequence] = field(default_factory=lambda: deque(maxlen=24))
    forks: deque[Fork] = field(default_factory=lambda: deque(maxlen=24))
    unread: deque[SoakSequence] = field(default_factory=lambda: deque(maxlen=24))
    linear: list[tuple[int, ...]] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    groups: list[GroupAnswer] = field(default_factory=list)
    has_pages: bool = False
    outcomes: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    marks: list[tuple[int, float, float]] = field(default_factory=list)
    computed_tokens: int = 0

    async def send(self, sequence: SoakSequence, new: int, **fields: Any) -> Answer:
        """Send a request for `new` tokens. Raises `NotCached`, or `Violation` for any other error."""
        sampling: dict[str, Any] = {"max_new_tokens": new, "temperature": 0, "ignore_eos": True}
        if layout := extend_layout(sequence.joined, len(sequence.ids)):
            sampling["custom_params"] = {"apr_layout": json.dumps(layout)}
        body = {"input_ids": sequence.ids, "sampling_params": sampling, **fields}
        async with self.session.post(f"{self.url}/generate", json=body) as response:
            if response.status == 409 and sequence.joined:
                raise NotCached
            if response.status != 200:
                raise Violation(f"{response.status}: {(await response.text())[:200]}")
            data = await response.json()
        ids, meta = tuple(data["output_ids"]), data["meta_info"]
        if len(ids) != new or meta["prompt_tokens"] != len(sequence.ids):
            raise Violation(
                f"{len(ids)} tokens, expected {new}; a prompt of {meta['prompt_tokens']}, expected {len(sequence.ids)}"
            )
        self.computed_tokens += len(sequence.ids) - meta["cached_tokens"] + new
        return Answer(sequence, ids, meta["cached_tokens"])

    async def commit(self, sequence: SoakSequence) -> None:
        """Commit all branches that a sequence has joined, in an order that lets each find its prefix."""
        for ranges, layout in commit_prompts(extend_layout(sequence.joined, len(sequence.ids)) or ()):
            ids = sum((sequence.ids[first:last] for first, last in ranges), ())
            await self.send(SoakSequence(ids, layout[:-1] if layout else ()), 0)

    async def decode_fork(self, trunk: SoakSequence, rng: random.Random) -> Fork:
        """Decode branches in parallel, each after a header of its own."""
        heads = [trunk.extended(random_ids(rng, 1, 3)) for _ in range(rng.randint(1, 5))]
        answers = await asyncio.gather(*(self.send(head, rng.randint(1, 12)) for head in heads))
        return Fork(trunk, [a.sequence.extended(a.ids) for a in answers])

    async def join(self, fork: Fork, rng: random.Random, *, commit: bool) -> SoakSequence:
        """Continue after the branches of a fork, which are committed first if `commit` is set."""
        sequence = fork.joined().extended(random_ids(rng, 1, 4))
        if commit:
            await self.commit(sequence)
        answer = await self.send(sequence, rng.randint(0, 8), **extras(rng))
        computed = len(sequence.ids) - answer.cached
        tail = (extend_layout(sequence.joined, len(sequence.ids)) or (0,))[-1]
        assert isinstance(tail, int), "the tail of a layout is linear"
        if computed > tail:
            raise Violation("a joined prompt was computed again")
        self.answers.append(answer)
        self.unread.append(sequence)
        return sequence.extended(answer.ids)

    def known_prefix(self, ids: Sequence[int]) -> int:
        """How many tokens at the beginning of a linear prompt were sent as a linear prompt before."""
        return max((common_prefix(sent, ids) for sent in self.linear), default=0)

    def remember(self, sequence: SoakSequence) -> None:
        """Let other operations continue a sequence, unless it is too long."""
        if len(sequence.ids) < MAX_PROMPT_TOKENS:
            self.sequences.append(sequence)


def random_ids(rng: random.Random, low: int, high: int) -> tuple[int, ...]:
    """Between `low` and `high` token ids."""
    return tuple(rng.choices(VOCABULARY, k=rng.randint(low, high)))


async def prefix(soak: Soak, rng: random.Random) -> None:
    sequence = SoakSequence(random_ids(rng, 8, 60))
    await soak.send(sequence, 0)
    soak.remember(sequence)


async def fork(soak: Soak, rng: random.Random) -> None:
    soak.forks.append(await soak.decode_fork(rng.choice(soak.sequences), rng))


async def commit(soak: Soak, rng: random.Random) -> None:
    await asyncio.gather(*(soak.send(branch, 0) for branch in rng.choice(soak.forks).branches))


async def join_without_commit(soak: Soak, rng: random.Random) -> None:
    soak.remember(await soak.join(rng.choice(soak.forks), rng, commit=False))


async def join_after_commit(soak: Soak, rng: random.Random) -> None:
    soak.remember(await soak.join(rng.choice(soak.forks), rng, commit=True))


async def nest(soak: Soak, rng: random.Random) -> None:
    """Let one branch fork and join before the outer join."""
    outer = rng.choice(soak.forks)
    number = rng.randrange(len(outer.branches))
    inner = await soak.decode_fork(outer.branches[number], rng)
    grown = await soak.join(inner, rng, commit=True)
    if len(grown.ids) < MAX_PROMPT_TOKENS:
        outer.branches[number] = grown


async def continue_sequence(soak: Soak, rng: random.Random) -> None:
    sequence = rng.choice(soak.sequences).extended(random_ids(rng, 1, 6))
    answer = await soak.send(sequence, rng.randint(1, 8), **extras(rng))
    soak.answers.append(answer)
    soak.remember(sequence.extended(answer.ids))


async def join_unknown_branches(soak: Soak, rng: random.Random) -> None:
    trunk = rng.choice(soak.sequences)
    await expect_not_cached(
        soak, Fork(trunk, [trunk.extended(random_ids(rng, 2, 9)) for _ in range(3)]).joined().extended((9,))
    )


async def join_with_wrong_salt(soak: Soak, rng: random.Random) -> None:
    await expect_not_cached(
        soak, rng.choice(soak.forks).joined().extended((9,)), cache_salt=str(rng.random())
    )


async def expect_not_cached(soak: Soak, sequence: SoakSequence, **fields: Any) -> None:
    try:
        await soak.send(sequence, 1, **fields)
    except NotCached:
        return
    raise Violation("the server joined branches that nobody has computed")


async def read_sequentially(soak: Soak, rng: random.Random) -> None:
    """Send a joined sequence without its layout: at most the first branch of a join is a prefix of it."""
    if not soak.unread:
        return
    sequence = soak.unread.popleft()
    known = max(linear_prefix(sequence.joined), soak.known_prefix(sequence.ids))
    soak.linear.append(sequence.ids)
    answer = await soak.send(SoakSequence(sequence.ids), rng.randint(1, 4))
    soak.answers.append(answer)
    if answer.cached > known + 2:  # two more tokens may be equal by chance
        raise Violation(
            f"{answer.cached} tokens of a joined sequence were found for a linear prompt: {sequence.joined}"
        )


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """The length of the common prefix."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def linear_prefix(joined: Layout) -> int:
    """How many tokens at the beginning of a joined prompt were computed sequentially."""
    total = 0
    for item in joined:
        if not isinstance(item, int):
            return total + linear_prefix(item[0])
        total += item
    return total


async def abort(soak: Soak, rng: random.Random) -> None:
    """Abort a request, or close its connection, at a random time."""
    fork = rng.choice(soak.forks)
    joined = fork.joined().extended(random_ids(rng, 1, 40))
    sequence = rng.choice([joined, joined, fork.trunk, rng.choice(fork.branches)])
    rid = f"{rng.getrandbits(64):016x}"
    task = asyncio.create_task(soak.send(sequence, 200, rid=rid, stream=rng.random() < 0.5, **extras(rng)))
    await asyncio.wait([task], timeout=rng.uniform(0, 0.3))
    if rng.random() < 0.5:
        async with soak.session.post(f"{soak.url}/abort_request", json={"rid": rid}) as response:
            await response.read()
    else:
        task.cancel()
    (result,) = await asyncio.gather(task, return_exceptions=True)
    if sequence is joined:
        soak.unread.append(sequence)
    if isinstance(result, NotCached):
        raise result


def extras(rng: random.Random) -> dict[str, Any]:
    """Additional request fields, sometimes."""
    return rng.choice([{}, {}, {"return_logprob": True, "top_logprobs_num": 2}])


async def send_malformed_layout(soak: Soak, rng: random.Random) -> None:
    bad = rng.choice(["[", "7", "[1e9, [[1]], 3]", "[-1, [[1]], 3]", "[1, [[1]], 9999]"])
    body = {"input_ids": random_ids(rng, 20, 40), "sampling_params": {"custom_params": {"apr_layout": bad}}}
    async with soak.session.post(f"{soak.url}/generate", json=body) as response:
        if response.status != 400:
            raise Violation(f"{response.status} for {bad}")


OPERATIONS: dict[Callable[[Soak, random.Random], Awaitable[None]], int] = {
    prefix: 10, fork: 20, commit: 10, join_without_commit: 10, join_after_commit: 15, nest: 8, continue_sequence: 12,
    join_unknown_branches: 2, join_with_wrong_salt: 2, read_sequentially: 8, abort: 8, send_malformed_layout: 1,
}  # fmt: skip
