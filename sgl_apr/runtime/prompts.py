"""Prompts: text, token ids, or the messages of a chat. All become token ids before a run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from operator import index
from typing import Any

from sgl_apr.engine.base import Engine
from sgl_apr.engine.chat_template import encode_messages
from sgl_apr.errors import AprError
from sgl_apr.runtime.retry import as_engine_error
from sgl_apr.runtime.value_checks import MAX_VOCAB_SIZE, shorten
from sgl_apr.tokenizer import Tokenizer
from sgl_apr.trajectory.join_layout import Layout

Messages = Sequence[Mapping[str, Any]]
Prompt = str | Sequence[int] | Messages
EXPECTED = 'text, a list of token ids, or chat messages such as [{"role": "user", "content": "..."}]'
# Models have a few more ids than their tokenizers, since the number is rounded up.
PADDED_IDS = 4096


def check_prompt(prompt: Any) -> None:
    """Check that a prompt is text, token ids or messages.

    Raises:
        AprError: It is something else, is empty, or has a wrong part.
    """
    if isinstance(prompt, str):
        return
    if isinstance(prompt, bytes | bytearray | Mapping) or not hasattr(prompt, "__len__"):
        raise AprError(f"the prompt is {shorten(prompt)}, expected {EXPECTED}")
    if len(prompt) == 0:
        raise AprError(f"the prompt is empty, expected {EXPECTED}")
    if is_chat(prompt):
        for number, message in enumerate(prompt, 1):
            _check_message(number, message)
    else:
        check_token_ids(prompt, None)


def is_chat(prompt: Any) -> bool:
    """Whether a prompt is the messages of a chat: its first part is a mapping."""
    return not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], Mapping)


def check_token_ids(ids: Any, vocab_size: int | None) -> tuple[int, ...]:
    """Return token ids that the model has. Others would end SGLang's scheduler.

    Args:
        ids: The token ids.
        vocab_size: Number of token ids that the model has. None if it is not known.

    Raises:
        AprError: One of them is no whole number, or outside of the vocabulary.
    """
    try:
        checked = tuple(index(i) for i in ids)
        is_bool = any(isinstance(i, bool) for i in ids)
    except TypeError:
        is_bool = True
    if is_bool:
        raise AprError(f"the prompt is {shorten(ids)}, expected {EXPECTED}")
    largest = (MAX_VOCAB_SIZE if vocab_size is None else vocab_size) - 1
    if wrong := [i for i in checked if not 0 <= i <= largest][:1]:
        raise AprError(
            f"the prompt has the token id {shorten(wrong[0])}, which is outside of the vocabulary: 0 to {largest}"
        )
    return checked


class TurnPrompt(tuple[int, ...]):
    """Token ids of a prompt that begins with an earlier turn: see `apr.next_turn`.

    Attributes:
        layout: How that turn is joined in the KV cache, up to the end of its last join. Empty if it is one sequence.
    """

    layout: Layout = ()


def layout_of_prompt(prompt: Prompt) -> Layout:
    """Return how the beginning of a prompt is joined in the KV cache."""
    return prompt.layout if isinstance(prompt, TurnPrompt) else ()


def encode_text(tokenizer: Tokenizer, prompt: str) -> tuple[int, ...]:
    """Return the token ids of a prompt that is text.

    Raises:
        AprError: There are none.
    """
    ids = tuple(tokenizer.encode(prompt, add_special_tokens=True))
    if not ids:
        raise AprError(f"the prompt is {shorten(prompt)}, which has no tokens: expected {EXPECTED}")
    return ids


def vocab_size(engine: Engine) -> int | None:
    """Return the number of token ids that a model has, at most. None if that is not known."""
    size = getattr(engine, "vocab_size", None)
    if isinstance(size, int):
        return size
    tokens = getattr(engine.tokenizer, "vocab_size", None)
    return tokens + PADDED_IDS if isinstance(tokens, int) else None


async def encode_prompt(
    engine: Engine, prompt: Prompt, tools: Sequence[Mapping[str, Any]] | None = None
) -> tuple[int, ...]:
    """Return the token ids of a prompt.

    Args:
        engine: Its tokenizer encodes text. Messages are rendered by the chat template of its model, up to where the
            reply begins.
        prompt: Text, token ids that are sent as they are, or chat messages.
        tools: Tools in OpenAI's form, which the template shows to the model together with messages.

    Raises:
        AprError: The prompt is something else, is empty, or has ids that the model does not have.
        UnsupportedEngine: There are messages, and the model has no chat template.
        EngineError: The engine failed.
    """
    check_engine(engine)
    check_prompt(prompt)
    if isinstance(prompt, str):
        return encode_text(engine.tokenizer, prompt)
    if not is_chat(prompt):
        return check_token_ids(prompt, vocab_size(engine))
    messages = [dict(message) for message in prompt if isinstance(message, Mapping)]
    try:
        return tuple(await encode_messages(engine, messages, tools))
    except OSError as error:  # also TimeoutError
        raise as_engine_error(error) from error


def check_engine(engine: Any) -> None:
    """Check that something is an engine.

    Raises:
        AprError: It is not. For a URL the message says how to connect.
    """
    if isinstance(engine, str):
        raise AprError(
            f"the engine is {shorten(engine)}, expected an engine, such as "
            f"await apr.HttpEngine.connect({shorten(engine)}); apr.run takes a URL"
        )
    if not all(hasattr(engine, name) for name in ("decode", "fork", "tokenizer")):
        raise AprError(
            f"the engine is {shorten(engine)}, expected an apr.HttpEngine, an apr.LocalEngine, or another apr.Engine"
        )


def _check_message(number: int, message: Any) -> None:
    if not isinstance(message, Mapping):
        raise AprError(f"message {number} is {shorten(message)}, expected an object with role and content")
    if not isinstance(message.get("role"), str):
        raise AprError(f"message {number} has the role {shorten(message.get('role'))}, expected text")
    if message.get("tool_calls") is not None:
        _check_calls(number, message)
    content = message.get("content")
    if message["role"] == "tool":
        if not isinstance(call := message.get("tool_call_id"), str):
            raise AprError(
                f"message {number} has the tool_call_id {shorten(call)}, expected text: the id of the call that it answers"
            )
        if content is None:
            raise AprError(f"message {number} has the content None, expected the result of a tool as text")
    if isinstance(content, list | tuple):
        for part in content:
            is_text = isinstance(part, Mapping) and part.get("type") == "text"
            if not (is_text and isinstance(part.get("text"), str)):
                raise AprError(
                    f"message {number} has the part {shorten(part)}, "
                    'expected {"type": "text", "text": "..."}: a trajectory has no images, video or audio'
                )
    elif content is not None and not isinstance(content, str):
        raise AprError(f"message {number} has the content {shorten(content)}, expected text")


def _check_calls(number: int, message: Mapping[str, Any]) -> None:
    """Check the calls of tools in a message."""
    calls = message["tool_calls"]
    if message["role"] != "assistant":
        raise AprError(f"message {number} has tool_calls and the role {message['role']}, expected assistant")
    for call in calls if isinstance(calls, list | tuple) else [calls]:
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise AprError(
                f"message {number} has the tool call {shorten(call)}, expected "
                '{"id": "...", "type": "function", "function": {"name": "...", "arguments": "{...}"}}'
            )
        arguments = function.get("arguments")
        try:
            value = json.loads(arguments) if isinstance(arguments, str) else arguments
        except ValueError:
            value = None
        if not isinstance(value, Mapping):
            raise AprError(
                f"message {number} calls {function['name']} with the arguments {shorten(arguments)}, "
                "expected the JSON of an object"
            )
