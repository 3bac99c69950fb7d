"""The messages of a chat request that bring results of tools: which calls they answer, and whether all fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sgl_apr.errors import AprError
from sgl_apr.runtime.value_checks import shorten
from sgl_apr.server.api.tools.client_calls import session_of


@dataclass(frozen=True, slots=True)
class Message:
    """What makes two messages the same, whatever fields a client adds or leaves out.

    Attributes:
        role: The role.
        text: The text of its content.
        calls: The ids of its calls, or the id of the call that it answers.
    """

    role: str
    text: str
    calls: tuple[str, ...] = ()


def parse_messages(messages: Any) -> tuple[Message, ...]:
    """Return the messages of a chat request. SGLang has checked their form.

    Raises:
        AprError: The result of a tool is not text.
    """
    return tuple(_parse_message(message) for message in messages or () if isinstance(message, Mapping))


def waiting_session(messages: Sequence[Message]) -> str | None:
    """Return the id of the session whose calls the last messages answer, or None if they answer none.

    Raises:
        AprError: They answer calls of several sessions.
    """
    sessions = set[str | None]()
    for message in reversed(messages):
        if message.role != "tool":
            break
        sessions.add(session_of(message.calls[0] if message.calls else None))
    if sessions <= {None}:
        return None
    if len(sessions) > 1:
        raise AprError(
            "the last messages answer calls of different replies, expected one message with the role tool for each call "
            "of the last reply"
        )
    return next(iter(sessions))


def match_results(messages: Sequence[Message], calls: Sequence[str]) -> dict[str, str]:
    """Return the results of calls, by id.

    Args:
        messages: What follows the messages that were answered with these calls: the calls, then the results.
        calls: The ids of the calls.

    Raises:
        AprError: A result is missing, twice, or before its call.
    """
    results, announced = dict[str, str](), set[str]()
    for message in messages:
        if message.role == "assistant":
            announced |= set(message.calls)
            continue
        if message.role != "tool":
            raise AprError(
                f"a message with the role {shorten(message.role)} follows tool calls, expected tool messages"
            )
        (call,) = message.calls
        if call not in announced:
            raise AprError(
                f"the result of {shorten(call)} comes before a message of the assistant with this tool call"
            )
        if call in results:
            raise AprError(f"there are two results of {shorten(call)}, expected one")
        if call not in calls:
            raise AprError(
                f"{shorten(call)} does not wait for a result, expected results of {', '.join(calls)}"
            )
        results[call] = message.text
    if missing := [call for call in calls if call not in results]:
        raise AprError(
            f"there is no result of {', '.join(missing)}, expected one message with the role tool for each of the "
            f"{len(calls)} tool calls"
        )
    return results


def _parse_message(message: Mapping[str, Any]) -> Message:
    role = str(message.get("role"))
    calls = tuple(
        str(call.get("id")) for call in message.get("tool_calls") or () if isinstance(call, Mapping)
    )
    if role == "tool":
        calls = (str(message.get("tool_call_id")),)
        for part in content if isinstance(content := message.get("content"), list) else ():
            if isinstance(part, Mapping) and part.get("type") != "text":
                raise AprError(
                    f"the result of {shorten(calls[0])} has {shorten(part.get('type'))}, expected text"
                )
    return Message(role, content_text(message.get("content")), calls)


def content_text(content: Any) -> str:
    """Return the text of a message's content, which is text or a list of parts.

    Examples:
        >>> content_text([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]), content_text(None)
        ('ab', '')
    """
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    return "".join(str(part.get("text", "")) if isinstance(part, Mapping) else str(part) for part in parts)
