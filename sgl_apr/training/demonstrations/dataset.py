"""The demonstrations of a split: half of the messages have several parts, and half have one."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import replace

from sgl_apr.errors import AprError
from sgl_apr.formats.dialects import dialect
from sgl_apr.tokenizer import Tokenizer
from sgl_apr.training.demonstrations import multi_part, single_part
from sgl_apr.training.demonstrations.chat_prompt import chat_prompt
from sgl_apr.training.demonstrations.fork_reply import DIALECT, Demonstration
from sgl_apr.training.demonstrations.plain_replies import PlainReply, is_loop, read_replies
from sgl_apr.training.demonstrations.topics import Split
from sgl_apr.trajectory.trajectory import Trajectory

PLAIN_SHARE = 0.5  # of the messages with one part: ordinary instructions
WRITTEN_BY_RUNTIME = ("lead", "header", "tail")


def demonstrations(
    split: Split, count: int, seed: int = 0, *, plain_share: float = PLAIN_SHARE
) -> Iterator[Demonstration]:
    """Demonstrations in turn: with several parts, with one. The same arguments give the same ones.

    Args:
        split: Topics and wordings of the test split are in no training data.
        count: How many.
        seed: Seed of the random choices.
        plain_share: Share of the messages with one part that are ordinary instructions, with a reply of the base model. These
            come again where there are not as many.

    Raises:
        AprError: If the count is negative, or there is no reply of the base model for the split.
        MissingExtra: If reasoning-gym is not installed.
    """
    if count < 0 or not 0 <= plain_share <= 1:
        raise AprError(
            f"count = {count} and plain_share = {plain_share}, expected at least 0 and a share from 0 to 1"
        )
    plain = plain_demonstrations(split, seed) if plain_share else None
    for number in range(count):
        rng = random.Random(f"{split} {seed} {number}")
        if number % 2 and plain and rng.random() < plain_share:
            yield next(plain)
            continue
        generators = single_part.GENERATORS if number % 2 else multi_part.GENERATORS
        (generator,) = rng.choices(list(generators), list(generators.values()))
        yield generator(rng, split)


def plain_demonstrations(split: Split, seed: int = 0) -> Iterator[Demonstration]:
    """Ordinary instructions with the replies of the base model, in another order on every pass, without end."""
    replies = [r for r in read_replies() if r.split == split and not is_loop(r.reply)]
    if not replies:
        raise AprError(f"there is no reply of the base model for the split {split!r}")
    passed = 0
    while True:
        yield from map(_plain, random.Random(f"{seed} {passed}").sample(replies, len(replies)))
        passed += 1


def _plain(reply: PlainReply) -> Demonstration:
    return Demonstration(
        "plain", f"plain/{reply.split}", ("plain",), reply.message, reply.reply, (), is_multi_part=False,
        is_complete=reply.is_complete,
    )  # fmt: skip


def as_trajectory(demonstration: Demonstration, tokenizer: Tokenizer) -> Trajectory:
    """A demonstration as a trajectory to train on. What the runtime writes between branches has no loss.

    Args:
        demonstration: The demonstration.
        tokenizer: Of the model, which has each tag as one token.

    Raises:
        AprError: If a tag is no token of the tokenizer.
        TraceError: If the reply is not valid.
    """
    if missing := [tag for tag in dialect(DIALECT).tags if tokenizer.special_token_id(tag) is None]:
        raise AprError(
            f"{missing[0]} is not a token of the model, expected a checkpoint with the tags of {DIALECT}"
        )
    return prompt_trajectory(demonstration, tokenizer)


def prompt_trajectory(demonstration: Demonstration, tokenizer: Tokenizer) -> Trajectory:
    """The same for any tokenizer, which may spell the tags out."""
    parsed = dialect(DIALECT).parse(demonstration.reply, tokenizer)
    spans = [replace(s, origin="injected") if s.role in WRITTEN_BY_RUNTIME else s for s in parsed.spans]
    if not demonstration.is_complete:
        spans[-1] = replace(spans[-1], finish="length")
    prompt = chat_prompt(demonstration.message)
    ids = tuple(tokenizer.encode(prompt, add_special_tokens=True))
    return replace(parsed, spans=tuple(spans)).with_prompt(prompt, ids)


def count_kinds(made: list[Demonstration]) -> Mapping[str, int]:
    """How many demonstrations there are of each kind."""
    return {kind: sum(d.kind == kind for d in made) for kind in sorted({d.kind for d in made})}
