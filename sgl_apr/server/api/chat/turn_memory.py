"""Remembers the token ids of replies, so that the next turn of a conversation finds them in the KV cache.

A client sends a reply back as text. Its template may leave out the reasoning of earlier turns, and encoding text anew
gives other ids than the model decoded. So the server keeps, for a while, the ids of what it has sent.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import threading
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sgl_apr.trajectory.join_layout import Layout, freeze_layout

MAX_ENTRIES = 100_000
ENTRY_BYTES = 512  # of an entry besides its ids and its layout, about
TAIL_CHARS = 256  # at least the characters of what a template writes where a reply begins
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class RenderedPrompt:
    """What a chat template made of the messages of a turn, for comparison with that of a later turn.

    Attributes:
        length: Its characters.
        head: A digest of it without its end.
        tail: Its end.
    """

    length: int
    head: bytes
    tail: str

    @classmethod
    def from_text(cls, text: str) -> RenderedPrompt:
        """Return what is kept of a text."""
        head = text[:-TAIL_CHARS] if len(text) > TAIL_CHARS else ""
        return cls(len(text), _digest(head.encode()), text[len(head) :])

    def begins_with(self, text: str) -> bool:
        """Whether it is `text` and the beginning of a reply: a template may open the reasoning there."""
        head = self.length - len(self.tail)
        return (
            head <= len(text) <= self.length
            and self.tail.startswith(text[head:])
            and _digest(text[:head].encode()) == self.head
        )


@dataclass(frozen=True, slots=True)
class RememberedTurn:
    """The token ids of a conversation up to the end of a reply.

    Attributes:
        ids: The ids, of 4 bytes each.
        layout: How they are joined in the KV cache, as JSON.
        prompt: What the template made of the messages before the reply.
    """

    ids: bytes
    layout: str
    prompt: RenderedPrompt

    @classmethod
    def make(cls, ids: Iterable[int], layout: Layout, prompt: RenderedPrompt) -> RememberedTurn:
        """Return the turn with packed ids."""
        return cls(array("I", ids).tobytes(), json.dumps(layout), prompt)

    @property
    def token_ids(self) -> list[int]:
        """The ids."""
        return array("I", self.ids).tolist()

    @property
    def kv_layout(self) -> Layout:
        """How the ids are joined in the KV cache, up to the end of the last join."""
        return freeze_layout(json.loads(self.layout))

    @property
    def size(self) -> int:
        """Bytes that it takes, about."""
        return len(self.ids) + len(self.layout) + ENTRY_BYTES


class TurnMemory:
    """The turns that a server remembers. The least recently used are forgotten first.

    Args:
        max_bytes: How many bytes they may take. 0 remembers nothing.
        max_entries: How many there may be.
    """

    def __init__(self, max_bytes: int, max_entries: int = MAX_ENTRIES) -> None:
        self._max_bytes, self._max_entries = max_bytes, max_entries
        self._turns: OrderedDict[bytes, RememberedTurn] = OrderedDict()
        self._bytes, self._lock = 0, threading.Lock()
        self._secret = secrets.token_bytes(32)
        self._counts = dict.fromkeys(("stored", "hits", "misses", "mismatched", "evicted"), 0)

    @property
    def is_on(self) -> bool:
        """Whether it remembers anything."""
        return self._max_bytes > 0

    def conversation(self, tenant: Sequence[str | None]) -> ConversationKey:
        """Return the key of an empty conversation.

        Args:
            tenant: What tells apart those who may not find one another's turns.
        """
        return ConversationKey(_digest(json.dumps(list(tenant)).encode(), self._secret))

    def find(self, key: bytes) -> RememberedTurn | None:
        """Return the turn of a key, and note that it was used."""
        with self._lock:
            turn = self._turns.get(key)
            if turn is not None:
                self._turns.move_to_end(key)
            return turn

    def store(self, key: bytes, turn: RememberedTurn) -> None:
        """Remember a turn, and forget others if it gets too much."""
        if turn.size > self._max_bytes:
            return
        with self._lock:
            self._drop(key)
            self._turns[key] = turn
            self._bytes += turn.size
            self._counts["stored"] += 1
            while self._bytes > self._max_bytes or len(self._turns) > self._max_entries:
                self._drop(next(iter(self._turns)))
                self._counts["evicted"] += 1

    def count(self, outcome: str) -> None:
        """Count a request with replies of earlier turns: one of "hits", "misses" and "mismatched"."""
        with self._lock:
            self._counts[outcome] += 1

    def to_json(self) -> dict[str, int]:
        """Return its size and its counts."""
        sizes = {"entries": len(self._turns), "bytes": self._bytes, "max_bytes": self._max_bytes}
        return sizes | self._counts

    def _drop(self, key: bytes) -> None:
        if turn := self._turns.pop(key, None):
            self._bytes -= turn.size


@dataclass(frozen=True, slots=True)
class ConversationKey:
    """The key of a conversation: a digest of who has it, and of its messages.

    Attributes:
        digest: The digest.
    """

    digest: bytes

    def extended(self, message: Mapping[str, Any]) -> ConversationKey:
        """Return the key of the conversation with one more message.

        White space around the content does not count, nor does the reasoning of a reply, which clients leave out.
        """
        fields = {
            name: value
            for name, value in message.items()
            if value and name not in ("reasoning_content", "reasoning", "content", "role")
        }
        text = json.dumps(
            [message.get("role"), content_text(message.get("content")), fields], sort_keys=True, default=str
        )
        return ConversationKey(_digest(text.encode(), self.digest))

    def reply(self, content: str) -> ConversationKey:
        """Return the key of the conversation with a reply."""
        return self.extended({"role": "assistant", "content": content})


def content_text(content: Any) -> Any:
    """Return the content of a message as text without outer white space and without reasoning.

    Content that has parts of another kind stays as it is.
    """
    if isinstance(content, list):
        parts = [part for part in content if not _is_reasoning(part)]
        texts = [
            part["text"] for part in parts if isinstance(part, Mapping) and isinstance(part.get("text"), str)
        ]
        if len(texts) < len(parts):
            return content
        content = " ".join(texts)  # as SGLang joins them
    return (content or "").strip() if isinstance(content, str | None) else content


def _is_reasoning(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") in ("thinking", "reasoning")


def _digest(data: bytes, key: bytes = b"") -> bytes:
    return hashlib.blake2b(data, digest_size=32, key=key).digest()
