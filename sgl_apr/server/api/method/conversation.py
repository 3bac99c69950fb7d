"""A chat request as a problem: its last message, and how it is put to the served model."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sgl_apr.errors import AprError

Render = Callable[[list[dict[str, Any]]], str]  # messages, up to where the reply begins


@dataclass(frozen=True, slots=True)
class Conversation:
    """How the last message of a conversation is put to the model.

    Attributes:
        before: Text before the message: the messages before it, and the beginning of its turn.
        after: Text after it, up to where the reply begins.
        between: Text after a reply, before a further message.
        quoted: What the messages before it say.
    """

    before: str
    after: str
    between: str
    quoted: tuple[str, ...] = ()

    def turn(self, message: str, *, first: bool = True) -> str:
        """The text of a user's message; `first` means that it is the last one of the conversation."""
        return f"{self.before if first else self.between}{message}{self.after}"


def read_conversation(messages: Sequence[Mapping[str, Any]], render: Render) -> tuple[str, Conversation]:
    """Return the last message of a conversation, and how it is put to the model.

    Args:
        messages: The messages in OpenAI's form.
        render: Applies the chat template.

    Raises:
        AprError: The last message is no text of a user, or the template does not repeat the text of messages.
    """
    *earlier, last = [{**message, "content": _text(message)} for message in messages] or [{}]
    if last.get("role") != "user" or not last.get("content"):
        raise AprError("the last message is not one of a user, expected a question for the method")
    problem, reply, further = (f"m{secrets.token_hex(8)}" for _ in range(3))
    question = {"role": "user", "content": problem}
    once = render([*earlier, question])
    twice = render(
        [*earlier, question, {"role": "assistant", "content": reply}, {"role": "user", "content": further}]
    )
    before, found, after = once.partition(problem)
    between = twice.partition(reply)[2].partition(further)[0]
    if not found or not between:
        raise AprError(
            "the chat template of the model does not repeat the text of a message, so no method can use it"
        )
    quoted = tuple(message["content"] for message in earlier if message["content"])
    return last["content"], Conversation(before, after, between, quoted)


def _text(message: Mapping[str, Any]) -> str:
    """The text of a message.

    Raises:
        AprError: It has parts that are no text.
    """
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    parts = [str(part.get("text", "")) for part in content if part.get("type") == "text"]
    if len(parts) < len(content):
        raise AprError("images, video and audio cannot be combined with apr")
    return "\n".join(parts)
