"""Replies of the base model to ordinary instructions, by a server, stored compactly.

Trained on its own greedy replies, a model keeps them (self-distillation), so that what it learns beside them costs little of it.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import re
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass
from importlib.resources import files
from pathlib import Path

from sgl_apr.engine.base import Request
from sgl_apr.engine.http import HttpEngine
from sgl_apr.errors import AprError
from sgl_apr.training.demonstrations.topics import Split

FILE = "plain_replies.jsonl.gz"
MAX_TOKENS = 112
CONCURRENT_REQUESTS = 64
RUN_WORDS, DISTINCT_SHARE = 4, 0.75  # a reply of whose runs of 4 words fewer are different is a loop


@dataclass(frozen=True, slots=True)
class PlainReply:
    """A message and the reply of the base model.

    Attributes:
        split: The split of its message.
        message: The message.
        reply: The reply.
        is_complete: Whether the model ended it, instead of a limit.
    """

    split: Split
    message: str
    reply: str
    is_complete: bool


def is_loop(text: str) -> bool:
    """Whether a text repeats itself, as small models do.

    Examples:
        >>> is_loop("It is good for you and me. " * 3), is_loop("A cat purrs when it is calm.")
        (True, False)
    """
    words = re.findall(r"\w+", text.lower())
    runs = [tuple(words[i : i + RUN_WORDS]) for i in range(len(words) - RUN_WORDS + 1)]
    return bool(runs) and len(set(runs)) < DISTINCT_SHARE * len(runs)


async def generate_replies(
    url: str,
    messages: Sequence[str],
    split: Split,
    prompt: Callable[[str], str],
    *,
    seconds: float = float("inf"),
    max_tokens: int = MAX_TOKENS,
) -> list[PlainReply]:
    """Greedy replies of a served model.

    Args:
        url: The server.
        messages: The messages.
        split: Their split.
        prompt: Makes the prompt of a message.
        seconds: No request starts later than this. What is missing then is left out.
        max_tokens: Where replies are cut.

    Raises:
        EngineError: If the server fails.
    """
    until, semaphore = time.monotonic() + seconds, asyncio.Semaphore(CONCURRENT_REQUESTS)
    async with await HttpEngine.connect(url) as engine:

        async def reply(number: int, message: str) -> PlainReply | None:
            async with semaphore:
                if time.monotonic() > until:
                    return None
                ids = tuple(engine.tokenizer.encode(prompt(message), add_special_tokens=True))
                request = Request(f"plain-{number:06}", ids, max_tokens, {"temperature": 0.0})
                result = await engine.decode(request)
            tokens = [i for i in result.token_ids if i not in engine.tokenizer.eos_ids]
            return PlainReply(split, message, engine.tokenizer.decode(tokens), result.finish == "stop")

        replies = await asyncio.gather(*(reply(k, message) for k, message in enumerate(messages)))
    return [r for r in replies if r is not None]


def write_replies(path: Path, replies: Iterable[PlainReply]) -> None:
    """Write replies into a compressed file, whose bytes depend on the replies alone."""
    text = "".join(json.dumps(astuple(reply), ensure_ascii=False) + "\n" for reply in replies)
    path.write_bytes(gzip.compress(text.encode(), mtime=0))


def read_replies(path: Path | None = None) -> list[PlainReply]:
    """The replies of a file, by default those that come with the package.

    Raises:
        AprError: If the file cannot be read or holds something else.
    """
    try:
        data = path.read_bytes() if path else files(__package__).joinpath(FILE).read_bytes()
        return [_plain_reply(*json.loads(line)) for line in gzip.decompress(data).decode().splitlines()]
    except (OSError, EOFError, ValueError, TypeError, zlib.error) as error:
        raise AprError(f"{path or FILE} cannot be read as replies of the base model: {error}") from None


def _plain_reply(split: Split, message: str, reply: str, is_complete: bool) -> PlainReply:
    if split not in ("train", "test") or not isinstance(message, str) or not isinstance(reply, str):
        raise ValueError(
            f"a line begins with {split!r} and {message!r}, expected a split, a message and a reply"
        )
    return PlainReply(split, message, reply, bool(is_complete))
