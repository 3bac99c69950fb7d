"""Makes the prompt of a chat request: rendered by SGLang, with the token ids that earlier replies had."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import HTTPException

from sgl_apr.engine.untrusted_text import Rendered, UntrustedText, render_untrusted
from sgl_apr.errors import AprError, EngineError
from sgl_apr.formats.token_split import split_token_ids
from sgl_apr.server.api.chat.turn_memory import ConversationKey, RememberedTurn, RenderedPrompt, TurnMemory
from sgl_apr.server.api.openai.reply import answer_start, find_stop, split_reply
from sgl_apr.server.kv_join.cache_keys import lookup_cost
from sgl_apr.server.kv_join.validation import MAX_LAYOUT_CHARS, MAX_LOOKUP_COST
from sgl_apr.tokenizer import Tokenizer, plain_ids
from sgl_apr.trajectory.causal_graph import context_layout
from sgl_apr.trajectory.join_layout import MAX_ITEMS, Layout, extend_layout
from sgl_apr.trajectory.trajectory import Trajectory

MAX_LOOKUPS = 8  # replies of a conversation that are looked up, the last ones first
MAX_RENDERINGS = 2  # of these, how many are compared with what the template makes now


@dataclass(frozen=True, slots=True)
class ChatTurn:
    """A turn under way, whose reply is remembered when it ends.

    Attributes:
        memory: Where it is remembered.
        key: The key of the conversation before the reply.
        prompt: What the template made of it.
        separate_reasoning: Whether the content of the reply is the answer alone.
        stop: Texts before which the content ends.
    """

    memory: TurnMemory
    key: ConversationKey
    prompt: RenderedPrompt
    separate_reasoning: bool = True
    stop: tuple[str, ...] = ()

    def remember(self, trajectory: Trajectory, tokenizer: Tokenizer) -> None:
        """Remember the ids of a reply by the text that the client has got."""
        layout = context_layout(trajectory)
        if layout is None:
            return
        ids = self._sent_ids(trajectory, tokenizer)
        reply = split_reply(trajectory, separate_reasoning=self.separate_reasoning, stop=self.stop)
        turn = RememberedTurn.make(ids, layout, self.prompt)
        for content in {reply.content.strip(), (reply.reasoning + reply.content).strip()}:
            self.memory.store(self.key.reply(content).digest, turn)

    def _sent_ids(self, trajectory: Trajectory, tokenizer: Tokenizer) -> Sequence[int]:
        """The ids of the context. They end where a stop string has ended the content."""
        ids, start = trajectory.context_ids, answer_start(trajectory)
        position = find_stop(trajectory.text[start:], self.stop)
        if position is None:
            return ids
        spans = [trajectory.spans[index] for index in trajectory.answer_spans]
        answer = tuple(i for span in spans for i in span.token_ids or ())
        text = "".join(span.text for span in spans)
        sent = text[: start + position - (len(trajectory.text) - len(text))]
        before = ids[: len(ids) - len(answer)]
        kept = next(split_token_ids(answer, text, [len(sent), len(text)], tokenizer))
        while kept and not sent.startswith(
            tokenizer.decode(kept, before)
        ):  # the stop string begins inside a token
            kept = kept[:-1]
        rest = sent[len(tokenizer.decode(kept, before)) :] if kept else sent
        return [*before, *kept, *plain_ids(tokenizer, rest)]


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """The prompt of a chat request.

    Attributes:
        generate: SGLang's `GenerateReqInput`, with the prompt.
        layout: How the beginning of the prompt is joined in the KV cache.
        turn: What remembers the reply. None if nothing does.
    """

    generate: Any
    layout: Layout = ()
    turn: ChatTurn | None = None


async def make_chat_prompt(
    serving: Any,
    request: Any,
    raw_request: Any,
    tokenizer: Tokenizer,
    memory: TurnMemory | None,
    max_tokens: int,
) -> ChatPrompt:
    """Make the prompt of a chat request. Like SGLang, it applies the chat template in a thread.

    Args:
        serving: SGLang's serving object of the route.
        request: SGLang's `ChatCompletionRequest`.
        raw_request: The HTTP request.
        tokenizer: The tokenizer of the model.
        memory: The replies of earlier turns. None if they are not to be used.
        max_tokens: How long a prompt of remembered ids may be.

    Raises:
        AprError: SGLang or the template refuses the request.
        EngineError: SGLang refuses it with an HTTP status.
    """
    builder = _PromptBuilder(serving, request, raw_request, tokenizer, memory, max_tokens)
    return await asyncio.to_thread(builder.build)


def internal_request(serving: Any, request: Any, raw_request: Any) -> Any:
    """Return SGLang's `GenerateReqInput` of a request.

    Raises:
        AprError: SGLang refuses the request.
        EngineError: It does so with an HTTP status.
    """
    try:
        return serving._convert_to_internal_request(request, raw_request)[0]
    except HTTPException as error:
        raise EngineError(str(error.detail), error.status_code) from error
    except ValueError as error:
        raise AprError(str(error)) from error


@contextmanager
def marked_messages(request: Any, untrusted: UntrustedText, anchored: int | None = None) -> Iterator[None]:
    """Replace what strangers wrote in a request by placeholders, for the duration of the block.

    Args:
        request: SGLang's `ChatCompletionRequest`.
        untrusted: Makes the placeholders.
        anchored: The index of a reply that becomes an anchor.
    """
    messages, tools = request.messages, request.tools
    dumped = [message.model_dump() for message in messages]
    marked = untrusted.mark_messages(dumped)
    if anchored is not None:
        marked[anchored] = {"role": "assistant", "content": untrusted.anchor()}
    try:
        request.messages = [
            message if before == after else type(message).model_validate(after)
            for message, before, after in zip(messages, dumped, marked, strict=True)
        ]
        if tools:
            request.tools = [type(tool).model_validate(untrusted.mark(tool.model_dump())) for tool in tools]
        yield
    finally:
        request.messages = messages
        if tools:
            request.tools = tools


@dataclass(frozen=True, slots=True)
class _PromptBuilder:
    serving: Any
    request: Any
    raw_request: Any
    tokenizer: Tokenizer
    memory: TurnMemory | None
    max_tokens: int

    def build(self) -> ChatPrompt:
        generate, is_exact = self._render()
        ids = generate.input_ids
        if not is_exact or not self.memory or not isinstance(ids, list) or self.request.input_ids is not None:
            return ChatPrompt(generate)
        keys = self._keys(generate, self.memory)
        turn = ChatTurn(self.memory, keys[-1], RenderedPrompt.from_text(self.tokenizer.decode(ids)))
        layout: Layout = ()
        if found := self._find_turn(self.memory, keys):
            generate.input_ids, layout = found
        return ChatPrompt(generate, layout, turn)

    def _render(self) -> tuple[Any, bool]:
        """Return SGLang's request, and whether its prompt is exactly what the template makes."""
        generate: Any = None

        def render(untrusted: UntrustedText) -> Rendered:
            nonlocal generate
            with marked_messages(self.request, untrusted):
                generate = internal_request(self.serving, self.request, self.raw_request)
            rendered: Rendered = generate.text if generate.input_ids is None else generate.input_ids
            return rendered

        ids, is_exact = render_untrusted(self.tokenizer, render)
        if ids is not None:
            generate.input_ids = ids
        return generate, is_exact

    def _keys(self, generate: Any, memory: TurnMemory) -> list[ConversationKey]:
        """The keys of the conversation before each message, and of all of it."""
        authorization = self.raw_request.headers.get("authorization") if self.raw_request else None
        tenant = (
            authorization,
            self.request.model,
            generate.lora_path,
            generate.cache_salt,
            generate.extra_key,
        )
        keys = [memory.conversation([None if part is None else str(part) for part in tenant])]
        for message in self.request.messages:
            keys.append(keys[-1].extended(message.model_dump(exclude_none=True)))
        return keys

    def _find_turn(
        self, memory: TurnMemory, keys: Sequence[ConversationKey]
    ) -> tuple[list[int], Layout] | None:
        """Return the prompt with the ids of the last reply that is remembered, and its layout."""
        messages = self.request.messages
        replies = [i for i, m in enumerate(messages[:-1]) if m.role == "assistant" and not m.tool_calls]
        renderings = 0
        for index in replies[: -MAX_LOOKUPS - 1 : -1]:
            turn = memory.find(keys[index + 1].digest)
            if turn is None or renderings == MAX_RENDERINGS:
                continue
            renderings += 1
            if after := self._encode_after(index, turn):
                ids = [*turn.token_ids, *after]
                if len(ids) <= self.max_tokens:
                    memory.count("hits")
                    return ids, usable_layout(turn.kv_layout, len(ids))
        if replies:
            memory.count("mismatched" if renderings else "misses")
        return None

    def _encode_after(self, index: int, turn: RememberedTurn) -> list[int] | None:
        """Encode what follows a reply, if what the template writes before it is what it wrote in that turn."""
        untrusted = UntrustedText(self.tokenizer)
        with marked_messages(self.request, untrusted, index):
            generate = internal_request(self.serving, self.request, self.raw_request)
        if generate.input_ids is None:
            return None
        split = untrusted.encode_after_anchor(generate.input_ids)
        return split[1] if split and turn.prompt.begins_with(split[0]) else None


def usable_layout(layout: Layout, tokens: int) -> Layout:
    """Return the layout of a prompt, or an empty one if the cache would refuse it: the prompt is then read as text."""
    complete = extend_layout(layout, tokens)
    if complete is None:
        return ()
    text = str(complete)
    is_small = len(text) <= MAX_LAYOUT_CHARS and text.count(",") + text.count("(") < MAX_ITEMS
    return layout if is_small and lookup_cost(complete) <= MAX_LOOKUP_COST else ()
