"""The prompts of a fork: the conversation with each task after it, and what follows the branches."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sgl_apr.engine.base import Engine
from sgl_apr.errors import AprError, EngineError, UnsupportedEngine
from sgl_apr.methods.fork_task import RESULTS_PLACEHOLDER, ForkTask, Merge
from sgl_apr.methods.requests import common_prefix
from sgl_apr.runtime.prompts import Prompt, encode_prompt, is_chat
from sgl_apr.runtime.value_checks import shorten
from sgl_apr.tokenizer import plain_ids

TokenIds = tuple[int, ...]
Message = dict[str, Any]
MIN_TASKS_BY_PARTS = 3
LONG_CONTENT, SHORT_CONTENT = 1000, "A text."  # of a message, in characters
REPLY = "The reply of a branch."  # stands for one where only the text around it is wanted


@dataclass(frozen=True, slots=True)
class ForkPrompts:
    """The token ids of the prompts of a fork.

    Attributes:
        context: What the conversation itself has in common with all of them. Branches fork there.
        tasks: The complete prompt of each branch.
    """

    context: TokenIds
    tasks: tuple[TokenIds, ...]

    @property
    def shared(self) -> TokenIds:
        """What all branches have in common, and what is computed once."""
        return self.context if len(self.tasks) == 1 else common_prefix(self.tasks)


class PromptRenderer:
    """Renders the prompts of one fork, by the chat template of the model or as text.

    Args:
        engine: Has the tokenizer and the chat template.
        prompt: Text, token ids, or chat messages.
        tools: The tools that the template shows to all branches, in OpenAI's form.
    """

    def __init__(
        self, engine: Engine, prompt: Prompt, tools: Sequence[Mapping[str, Any]] | None = None
    ) -> None:
        self.engine, self.prompt, self.tools = engine, prompt, tools
        self._context: TokenIds = ()
        # What the conversation and tasks have in common, how many tokens that is in a short one, and what renders that.
        self._short: tuple[TokenIds, int, PromptRenderer] | None = None
        self.messages: list[Message] | None = None
        if is_chat(prompt):
            self.messages = [dict(message) for message in prompt if isinstance(message, Mapping)]

    async def render_tasks(self, tasks: Sequence[ForkTask], merge: Merge | None = None) -> ForkPrompts:
        """Return the prompts of the tasks.

        Args:
            tasks: The tasks.
            merge: What will follow them.

        Raises:
            AprError: A task is messages, and the prompt is not, or the chat template refuses the messages.
        """
        if self.messages is None:
            context = self._context = await encode_prompt(self.engine, self.prompt)
            return ForkPrompts(context, tuple(context + self._encode_task(task) for task in tasks))
        turns = [as_messages(task.prompt) for task in tasks]
        context, prompts = await self._render_by_parts(turns) or await self._render_completely(turns)
        if not context and merge and merge.join == "text":
            context = await self.render_merge(merge, "")
        shortest = min(len(ids) for ids in prompts)  # a branch has a token of its own, from which it decodes
        shared = common_prefix([context, *prompts] if context else prompts)[: shortest - 1]
        if not shared:
            raise AprError(
                "the prompts of the tasks have no token in common, expected a chat template that begins "
                "with the conversation"
            )
        return ForkPrompts(shared, prompts)

    async def render_merge(self, merge: Merge, listing: str) -> TokenIds:
        """Return the complete prompt of a merge that reads results as text.

        Args:
            merge: The merge.
            listing: The results.
        """
        if self.messages is not None:
            turn = _with_listing(merge.prompt, listing)
            if self._short is None or not _is_user_turn(turn):
                return await self._render_chat(turn)
            base, after, renderer = self._short
            return base + (await renderer._render_chat(turn))[after:]
        context = self._context or await encode_prompt(self.engine, self.prompt)
        encode = self.engine.tokenizer.encode
        before, placeholder, rest = self._text(merge.prompt).partition(RESULTS_PLACEHOLDER)
        if not placeholder:
            before, rest = "", f"\n\n{before}"
        # What branches wrote may quote strangers, so no tag in it becomes a token.
        listed = plain_ids(self.engine.tokenizer, listing)
        return (*context, *encode("\n\n" + before), *listed, *encode(rest))

    async def render_after_branch(self, merge: Merge, task: ForkTask) -> TokenIds:
        """Return what follows a branch where a merge continues after the branches themselves.

        Args:
            merge: The merge.
            task: That of the branch.

        Raises:
            UnsupportedEngine: The chat template does not write a reply as it is.
        """
        if self.messages is None:
            return tuple(self.engine.tokenizer.encode("\n\n" + self._text(merge.prompt)))
        turn = as_messages(task.prompt)
        before, complete = await asyncio.gather(
            self._render_chat(turn),
            self._render_chat([*turn, {"role": "assistant", "content": REPLY}, *as_messages(merge.prompt)]),
        )
        start = len(common_prefix([before, complete]))
        decode = self.engine.tokenizer.decode
        for end in range(start + 1, min(len(complete), start + 200)):
            if decode(complete[start:end], complete[:start]).endswith(REPLY):
                return complete[end:]
        raise UnsupportedEngine(
            'the chat template changes replies of earlier turns, expected Merge(..., join="text") with this model'
        )

    async def _render_completely(
        self, turns: Sequence[Sequence[Message]]
    ) -> tuple[TokenIds, tuple[TokenIds, ...]]:
        """The conversation without a task, and with each of them."""
        rendered = await asyncio.gather(
            self._render_conversation(), *(self._render_chat(turn) for turn in turns)
        )
        return rendered[0], tuple(rendered[1:])

    async def _render_by_parts(
        self, turns: Sequence[Sequence[Message]]
    ) -> tuple[TokenIds, tuple[TokenIds, ...]] | None:
        """The same, but the conversation is encoded three times at most, however many tasks there are.

        What follows the conversation is taken from a short one with the same roles. It is the same there if the first and the
        last prompt are, and if it follows an added token, before which the encoding does not depend on what follows.

        Returns:
            None if the prompts cannot be made like this.
        """
        messages = self.messages or []
        short = [_shortened(message) for message in messages]
        if len(turns) < MIN_TASKS_BY_PARTS or not all(map(_is_user_turn, turns)) or short == messages:
            return None
        context, (first, last) = await self._render_completely([turns[0], turns[-1]])
        renderer = PromptRenderer(self.engine, short, self.tools)
        short_context, shorts = await renderer._render_completely(turns)
        if not context or not short_context:
            return None
        base = common_prefix([context, first, last])
        after = len(common_prefix([short_context, shorts[0], shorts[-1]]))
        prompts = tuple(base + ids[after:] for ids in shorts)
        added = self.engine.tokenizer.added_tokens.values()
        if not base or base[-1] not in added or (prompts[0], prompts[-1]) != (first, last):
            return None
        self._short = base, after, renderer
        return context, prompts

    async def _render_conversation(self) -> TokenIds:
        """The conversation without a task. Empty if the template needs one."""
        try:
            return await self._render_chat([])
        except EngineError:
            raise
        except AprError:
            return ()

    async def _render_chat(self, turn: Sequence[Message]) -> TokenIds:
        return await encode_prompt(self.engine, [*(self.messages or ()), *turn], self.tools)

    def _encode_task(self, task: ForkTask) -> TokenIds:
        return tuple(self.engine.tokenizer.encode(self._text(task.prompt)))

    @staticmethod
    def _text(prompt: Any) -> str:
        if not isinstance(prompt, str):
            raise AprError(
                f"a task or the merge is {shorten(prompt)}, expected text: the prompt is text or token ids, not chat messages"
            )
        return prompt


def _is_user_turn(turn: Sequence[Message]) -> bool:
    """Whether a turn is one message of a user."""
    return len(turn) == 1 and turn[0].get("role") == "user"


def _shortened(message: Message) -> Message:
    """The message, or one of the same role with a short text."""
    content = message.get("content")
    is_long = isinstance(content, str) and len(content) > LONG_CONTENT
    return {**message, "content": SHORT_CONTENT} if is_long else message


def as_messages(prompt: Any) -> list[Message]:
    """Return a prompt that follows a conversation as messages. Text is a user's."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    return [dict(message) for message in prompt]


def with_text_before(prompt: Any, text: str) -> Any:
    """Return a prompt that begins with a text."""
    return f"{text}\n\n{prompt}" if isinstance(prompt, str) else _with_listing(prompt, text)


def _with_listing(prompt: Any, listing: str) -> list[Message]:
    """The messages of a merge, with the results where they belong."""
    messages = as_messages(prompt)
    if any(RESULTS_PLACEHOLDER in str(message.get("content")) for message in messages):
        return [_replace_content(message, lambda text: _fill(text, listing)) for message in messages]
    if messages[0].get("role") != "user":
        return [{"role": "user", "content": listing}, *messages]
    content = messages[0].get("content")
    if isinstance(content, list | tuple):
        content = [{"type": "text", "text": listing + "\n\n"}, *content]
    else:
        content = _fill(content or "", listing)
    return [{**messages[0], "content": content}, *messages[1:]]


def _replace_content(message: Message, change: Any) -> Message:
    """A message whose texts with the placeholder are changed."""
    content = message.get("content")
    if isinstance(content, str) and RESULTS_PLACEHOLDER in content:
        return {**message, "content": change(content)}
    if isinstance(content, list | tuple):
        parts = [
            {**part, "text": change(part["text"])} if RESULTS_PLACEHOLDER in part.get("text", "") else part
            for part in content
        ]
        return {**message, "content": parts}
    return message


def _fill(text: str, listing: str) -> str:
    """A prompt with the results in place of the placeholder, or before it."""
    if RESULTS_PLACEHOLDER in text:
        return text.replace(RESULTS_PLACEHOLDER, listing)
    return f"{listing}\n\n{text}"
