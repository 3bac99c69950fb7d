"""Keeps what strangers write in the messages of a chat from becoming control tokens.

A chat template makes one text of its own tags and of what users, tools and clients wrote, so a user who writes
`<|im_end|>` could end the message. Here such spellings are replaced by placeholders before the template is applied.
Afterwards they are put back, and each is encoded in two pieces, neither of which is a tag.
"""

from __future__ import annotations

import json
import re
import secrets
from bisect import bisect_left
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sgl_apr.engine.spelling_parts import merged_ranges, spelling_parts
from sgl_apr.tokenizer import Tokenizer, added_token_scanner, encode_pieces

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]]
Rendered = str | Sequence[int]  # what a template made: text, or the token ids of the text
Render = Callable[[list[dict[str, Any]], list[Any] | None], Awaitable[Rendered]]

MODEL_FIELDS = (
    "content",
    "reasoning_content",
    "reasoning",
)  # of an assistant's message: the model wrote them
STRUCTURE = frozenset(  # what templates compare and look up, which is no text of a stranger
    [
        "role",
        "content",
        "name",
        "type",
        "text",
        "function",
        "description",
        "parameters",
        "properties",
        "required",
        "items",
        "enum",
        "strict",
        "tool_calls",
        "tool_call_id",
        "arguments",
        "id",
        "object",
        "string",
        "number",
        "integer",
        "boolean",
        "array",
        "null",
        "default",
        "format",
        "title",
        "$ref",
        "$defs",
        "user",
        "assistant",
        "system",
        "tool",
        "developer",
    ]
)
DIGITS = "".join(map(chr, range(0xE000, 0xE010)))  # characters of private use, as are the next two
START, END = "\ue010", "\ue011"
ZERO_WIDTH_SPACE = "\u200b"


async def encode_untrusted(
    tokenizer: Tokenizer, messages: Messages, tools: Tools | None, render: Render
) -> list[int]:
    """Return the token ids of rendered messages, in which no text of a stranger is an added token.

    Args:
        tokenizer: The tokenizer of the model.
        messages: The messages. The text of an assistant is the model's own, and its tags stay tokens.
        tools: The tools in OpenAI's form.
        render: Applies the chat template to messages and tools.
    """
    own_tokens = 0
    for untrusted in untrusted_texts(tokenizer):
        marked_tools = None if tools is None else untrusted.mark(tools)
        rendered = await render(untrusted.mark_messages(messages), marked_tools)
        ids = untrusted.encode(rendered)
        if ids is not None and (not untrusted.separated or untrusted.count_added(ids) <= own_tokens):
            return ids
        own_tokens = own_tokens or untrusted.count_added(rendered)
    return untrusted.encode(rendered) or []


def render_untrusted(
    tokenizer: Tokenizer, render: Callable[[UntrustedText], Rendered]
) -> tuple[list[int] | None, bool]:
    """Do the same where the renderer marks the messages itself, and where a prompt that it makes as text stays text.

    Args:
        tokenizer: The tokenizer of the model.
        render: Marks messages, applies the chat template, and returns what it made. It keeps the last result.

    Returns:
        The token ids, or None if the last result is to be used as it is. And whether no text was changed.
    """
    own_tokens = 0
    for untrusted in untrusted_texts(tokenizer):
        rendered = render(untrusted)
        if not untrusted.separated:
            if untrusted.is_empty:
                return None, True
            ids = None if isinstance(rendered, str) else untrusted.encode(rendered)
            if ids is not None:
                return ids, True
            own_tokens = untrusted.count_added(rendered)
        elif untrusted.count_added(rendered) <= own_tokens:
            break
    return None, False


def untrusted_texts(tokenizer: Tokenizer) -> Iterator[UntrustedText]:
    """Yield how to mark the same text, best first. All but the first change it a little."""
    yield UntrustedText(tokenizer)
    yield UntrustedText(tokenizer, separated=True, edges=False)
    yield UntrustedText(tokenizer, separated=True)


class UntrustedText:
    """Marks what strangers wrote, and encodes the rendered text so that no added token occurs in it.

    Args:
        tokenizer: The tokenizer of the model.
        separated: Write zero-width spaces between the characters of what would be marked, for templates that do not
            keep placeholders and for token ids that cannot be made from their text.
        edges: Mark what is only a part of a spelling, too, where the text next to it could complete it.
    """

    def __init__(self, tokenizer: Tokenizer, *, separated: bool = False, edges: bool = True) -> None:
        self.separated = separated
        self._tokenizer, self._edges = tokenizer, edges
        self._scanner = added_token_scanner(tokenizer)
        self._parts = spelling_parts(self._scanner.spellings)
        self._nonce = START + "".join(secrets.choice(DIGITS) for _ in range(16))
        self._marked: list[str] = []
        self._anchor = -1

    @property
    def is_empty(self) -> bool:
        """Whether nothing was marked."""
        return not self._marked

    def mark_messages(self, messages: Messages) -> list[dict[str, Any]]:
        """Return messages with placeholders. An assistant's text stays as it is."""
        return [self._mark_message(message) for message in messages]

    def mark(self, value: Any) -> Any:
        """Return a JSON value in which all texts and keys have placeholders."""
        if isinstance(value, str):
            return self._mark_text(value)
        if isinstance(value, Mapping):
            return {self.mark(key): self.mark(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.mark(item) for item in value]
        return value

    def mark_call(self, call: Any) -> Any:
        """Return a call of a tool with placeholders. Its arguments are an object, or the JSON of one."""
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(arguments := function.get("arguments"), str):
            return self.mark(call)
        try:
            value = json.loads(arguments)
        except ValueError:
            return self.mark(call)
        count = len(self._marked)
        marked = json.dumps(self.mark(value), ensure_ascii=False)
        if len(self._marked) == count:
            marked = arguments
        others = {key: item for key, item in function.items() if key != "arguments"}
        rest = {key: item for key, item in call.items() if key != "function"}
        return {**self.mark(rest), "function": {**self.mark(others), "arguments": marked}}

    def _mark_message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        trusted = MODEL_FIELDS if message.get("role") == "assistant" else ()
        marked = dict[str, Any]()
        for key, value in message.items():
            if key == "tool_calls" and isinstance(value, list | tuple):
                marked[key] = [self.mark_call(call) for call in value]
            else:
                marked[key] = value if key in trusted else self.mark(value)
        return marked

    def _mark_text(self, text: str) -> str:
        if text in STRUCTURE:
            return text
        ranges = [*self._scanner.occurrences(text), *(self._parts.edges(text) if self._edges else ())]
        if not ranges:
            is_normalized = getattr(self._tokenizer, "normalizes_added_tokens", False)
            if not is_normalized or self._scanner.ids.isdisjoint(self._tokenizer.encode(text)):
                return text
            ranges = [(0, len(text))]
        pieces, last = list[str](), 0
        for start, end in merged_ranges(ranges):
            pieces += [text[last:start], self._placeholder(text[start:end])]
            last = end
        return "".join([*pieces, text[last:]])

    def _placeholder(self, text: str) -> str:
        self._marked.append(text)
        if self.separated:
            return ZERO_WIDTH_SPACE.join(["", *text, ""])
        number = "".join(DIGITS[int(digit, 16)] for digit in f"{len(self._marked) - 1:x}")
        return f"{self._nonce}{START}{number}{END}"

    def count_added(self, rendered: Rendered) -> int:
        """Return how many added tokens there are in what a template made."""
        ids = self._tokenizer.encode(rendered) if isinstance(rendered, str) else rendered
        return sum(count for i, count in Counter(ids).items() if i in self._scanner.ids)

    def encode(self, rendered: Rendered) -> list[int] | None:
        """Encode what a template made of marked messages.

        Returns:
            The token ids. None if the template changed a placeholder, or if the ids do not decode to a text that has
            the same ids.
        """
        if not isinstance(rendered, str):
            if self.is_empty or self.separated:
                return list(rendered)
            ids, rendered = list(rendered), self._tokenizer.decode(rendered)
            if self._tokenizer.encode(rendered) != ids:
                return None
        if self.is_empty or self.separated:
            return self._tokenizer.encode(rendered)
        restored = self._restore(rendered)
        return None if restored is None else self.encode_marked(restored.text, restored.ranges)

    def anchor(self) -> str:
        """Return a placeholder for text that is known already, for `encode_after_anchor`."""
        self._anchor = len(self._marked)
        return self._placeholder("")

    def encode_after_anchor(self, rendered: Rendered) -> tuple[str, list[int]] | None:
        """Split what a template made at the only anchor.

        Returns:
            The text before the anchor, and the token ids of what follows it. None where `encode` returns None, or if
            the template dropped the anchor or repeated it.
        """
        if not isinstance(rendered, str):
            ids, rendered = list(rendered), self._tokenizer.decode(rendered)
            if self._tokenizer.encode(rendered) != ids:
                return None
        restored = self._restore(rendered)
        if restored is None or len(restored.anchors) != 1:
            return None
        (position,) = restored.anchors
        ranges = [(start - position, end - position) for start, end in restored.ranges if start >= position]
        after = self.encode_marked(restored.text[position:], ranges, continues=True)
        return restored.text[:position], after

    def _restore(self, rendered: str) -> RestoredText | None:
        """Put back what was marked. None if the template changed a placeholder."""
        pieces = re.split(f"{self._nonce}{START}([{DIGITS}]+){END}", rendered)
        ranges, anchors, length = list[tuple[int, int]](), list[int](), 0
        for index, piece in enumerate(pieces):
            if index % 2:
                number = int("".join(f"{DIGITS.index(digit):x}" for digit in piece), 16)
                if number >= len(self._marked):
                    return None
                pieces[index] = self._marked[number]
                if number == self._anchor:
                    anchors.append(length)
                else:
                    ranges.append((length, length + len(pieces[index])))
            elif self._nonce[:4] in piece:
                return None
            length += len(pieces[index])
        return RestoredText("".join(pieces), ranges, anchors)

    def encode_marked(
        self, text: str, ranges: Sequence[tuple[int, int]], *, continues: bool = False
    ) -> list[int]:
        """Encode a text so that no added token overlaps one of the ranges, which are ascending."""
        cuts, normalized = set[int](), set[int]()
        starts = [start for start, _ in ranges]
        for start, end in self._scanner.occurrences(text) if ranges else ():
            index = bisect_left(starts, end) - 1  # the last range that begins before the end
            if index >= 0 and ranges[index][1] > start:
                cuts.add(start + 1 if starts[index] <= start else starts[index])
        if getattr(self._tokenizer, "normalizes_added_tokens", False):
            normalized = {start for start, _ in ranges}
            cuts.update(offset for marked in ranges for offset in marked)
        inside = [cut for cut in sorted(cuts) if 0 < cut < len(text)]
        excluded = self._scanner.ids if normalized else frozenset[int]()
        return encode_pieces(
            self._tokenizer, text, inside, excluded=excluded, excluded_at=normalized, continues=continues
        )


@dataclass(frozen=True, slots=True)
class RestoredText:
    """Rendered text in which placeholders are replaced.

    Attributes:
        text: The text.
        ranges: Where strangers' text that was marked begins and ends.
        anchors: Where anchors stood.
    """

    text: str
    ranges: list[tuple[int, int]]
    anchors: list[int]
