"""The prompt of the next turn of a conversation: the token ids of the turn before, and what follows them."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from sgl_apr.engine.base import Engine
from sgl_apr.engine.chat_template import encode_messages
from sgl_apr.errors import AprError
from sgl_apr.formats.token_split import split_token_ids
from sgl_apr.runtime.prompts import TurnPrompt, check_engine, check_prompt
from sgl_apr.trajectory.causal_graph import context_layout
from sgl_apr.trajectory.trajectory import Trajectory


async def next_turn(
    engine: Engine,
    previous: Trajectory,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> TurnPrompt:
    """Return a prompt that continues a conversation after a reply.

    It begins with the token ids of the turn before, with the reasoning of that turn, so nearly all of them are cached. Chat
    messages alone are encoded anew, and a chat template may drop the reasoning.

    Args:
        engine: Renders the messages.
        previous: The trajectory of the turn before.
        messages: The conversation. Its last message of an assistant is the reply of `previous`: the answer, or the
            complete text.
        tools: Tools in OpenAI's form.

    Raises:
        AprError: No message is that reply, the messages are not valid, or the chat template does not write the reply as it
            is.
        UnsupportedEngine: The model has no chat template.

    Examples:
        >>> messages = [{"role": "user", "content": "..."}]
        >>> first = await apr.areason(engine, messages)  # doctest: +SKIP
        >>> messages += [{"role": "assistant", "content": first.answer}, {"role": "user", "content": "..."}]  # doctest: +SKIP
        >>> prompt = await apr.next_turn(engine, first, messages)  # doctest: +SKIP
        >>> second = await apr.areason(engine, prompt)  # doctest: +SKIP
    """
    check_engine(engine)
    check_prompt(messages)
    replies = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
    texts = {previous.answer.strip(), previous.text.strip()}
    if not replies or str(messages[replies[-1]].get("content")).strip() not in texts:
        raise AprError("the last message of an assistant is not the reply of the trajectory before")
    layout = context_layout(previous)
    if layout is None:
        raise AprError("the context of the trajectory before is not known: parts of it were dropped or lost")
    placeholder = f"reply{secrets.token_hex(16)}"
    marked = [dict(message) for message in messages]
    marked[replies[-1]] = {"role": "assistant", "content": placeholder}
    ids = tuple(await encode_messages(engine, marked, tools))
    text = engine.tokenizer.decode(ids)
    if text.count(placeholder) != 1:
        raise AprError("the chat template does not write the reply as it is")
    end = text.index(placeholder) + len(placeholder)
    known, after = split_token_ids(list(ids), text, [end, len(text)], engine.tokenizer)
    if engine.tokenizer.decode(known) != text[:end]:
        raise AprError("the chat template writes no token of its own after the reply")
    prompt = TurnPrompt((*previous.context_ids, *after))
    prompt.layout = layout
    return prompt
