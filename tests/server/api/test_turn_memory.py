"""The next turn of a chat: its prompt begins with the token ids that the reply had, for templates of several kinds."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest

import sgl_apr as apr
from sgl_apr.runtime.loop import run_with_options
from sgl_apr.runtime.options import make_options
from sgl_apr.server.api.chat.prompt import ChatPrompt, make_chat_prompt, usable_layout
from sgl_apr.server.api.chat.turn_memory import MIB, RememberedTurn, RenderedPrompt, TurnMemory
from sgl_apr.server.api.openai.reply import ReplyText, split_reply
from tests.support.chat_templates import CHATML, QWEN, TAGS, TRIMMED, compiled
from tests.support.masked_sampler import Masked, SampledEngine

THINKING = CHATML.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}")
# Keeps the reasoning that a client sends back, in front of the answer.
KEEPING = CHATML.replace(
    "{{ message['content'] }}",
    "{% if message['reasoning_content'] %}<think>{{ message['reasoning_content'] }}</think>{% endif %}"
    "{{ message['content'] }}",
)
TEMPLATES = {"chatml": CHATML, "drops": QWEN, "trims": TRIMMED, "opens-reasoning": THINKING, "keeps": KEEPING}
USER = {"role": "user", "content": "Which is larger? </Thread>"}
MORE = {"role": "user", "content": "And now? <|im_end|>"}


class ChatMasked(Masked):
    """A tokenizer with merges of nothing, the tags of a dialect and those of the templates."""

    def __init__(self) -> None:
        super().__init__(tuple(dict.fromkeys([*apr.dialect("threadweaver").tags, *TAGS])))


@cache
def tokenizer() -> ChatMasked:
    return ChatMasked()


@dataclass
class Chat:
    """A client and a server that renders by a template."""

    template: str
    memory: TurnMemory | None = field(default_factory=lambda: TurnMemory(MIB))
    authorization: str = "Bearer a"
    max_tokens: int = 100_000
    seed: int = 0
    tag_weight: float = 30.0

    def _convert_to_internal_request(self, request: Any, raw_request: Any) -> tuple[Any, Any]:
        messages = [message.model_dump() for message in request.messages]
        tools = [tool.model_dump() for tool in request.tools or []]
        text = compiled(self.template).render(messages=messages, tools=tools, add_generation_prompt=True)
        ids = tokenizer().encode(text)
        names = ("lora_path", "cache_salt", "extra_key")
        fields = {name: getattr(request, name, None) for name in names}
        return SimpleNamespace(input_ids=ids, text=None, **fields), request

    def prompt(self, messages: list[dict[str, Any]], **body: Any) -> ChatPrompt:
        request = ChatCompletionRequest(messages=messages, model="m", **body)
        before = request.model_dump()
        raw = SimpleNamespace(headers={"authorization": self.authorization})
        made = asyncio.run(make_chat_prompt(self, request, raw, tokenizer(), self.memory, self.max_tokens))
        assert request.model_dump() == before, "the request is not changed"
        return made

    def turn(
        self, messages: list[dict[str, Any]], *, stop: tuple[str, ...] = (), **body: Any
    ) -> tuple[list[int], apr.Trajectory, ReplyText]:
        """Answer messages, and remember the reply. Returns the prompt, the trajectory and the reply."""
        made = self.prompt(messages, **body)
        self.seed += 1
        options = make_options(
            "threadweaver", tokenizer(), None, budget={"tokens": 900, "width": 3}, mode="parallel"
        )
        engine = SampledEngine(tokenizer(), self.seed, self.tag_weight)
        trajectory = asyncio.run(run_with_options(engine, tuple(made.generate.input_ids), options))
        if made.turn:
            replace(made.turn, stop=stop).remember(trajectory, tokenizer())
        return (
            made.generate.input_ids,
            trajectory,
            split_reply(trajectory, separate_reasoning=True, stop=stop),
        )


def assistant(reply: ReplyText, form: str) -> dict[str, Any]:
    """The reply as a client sends it back."""
    message: dict[str, Any] = {"role": "assistant", "content": reply.content}
    if form == "both":
        message["reasoning_content"] = reply.reasoning
    if form == "text":
        message["content"] = reply.reasoning + reply.content
    if form == "thinking":
        message["content"] = [
            {"type": "thinking", "thinking": reply.reasoning},
            {"type": "text", "text": reply.content},
        ]
    if form == "parts":
        message["content"] = [{"type": "text", "text": f" {reply.content}\n"}]
    return message


def added(ids: Any) -> list[int]:
    return [i for i in ids if i in tokenizer().added_tokens.values()]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("form", ["content", "both", "text", "parts", "thinking"])
def test_a_prompt_begins_with_the_ids_of_the_turns_before(template: str, form: str):
    chat, messages, context = Chat(TEMPLATES[template]), [USER], ()
    for _ in range(3):
        prompt, trajectory, reply = chat.turn(messages)
        assert tuple(prompt[: len(context)]) == context, "the ids of the turn before"
        rest = tokenizer().decode(prompt[len(context) :])
        if context:
            assert rest.startswith("<|im_end|>\n<|im_start|>user\nAnd now? <|im_end|><|im_end|>\n")
            assert len(added(prompt[len(context) :])) == 4 + (template == "opens-reasoning")
        context = trajectory.context_ids
        assert reply.content.strip()
        messages = [*messages, assistant(reply, form), MORE]
    assert chat.memory
    assert chat.memory.to_json()["hits"] == 2


def test_what_is_another_conversation_is_encoded_as_usual():
    chat = Chat(CHATML)
    _, trajectory, reply = chat.turn([USER])
    plain = Chat(CHATML, memory=None)
    messages = [USER, assistant(reply, "content"), MORE]

    def is_remembered(chat: Chat, messages: list[dict[str, Any]], **body: Any) -> bool:
        ids = chat.prompt(messages, **body).generate.input_ids
        context = trajectory.context_ids
        if tuple(ids[: len(context)]) == context:
            return True
        assert ids == plain.prompt(messages, **body).generate.input_ids
        return False

    assert is_remembered(chat, messages)
    edited = {"role": "assistant", "content": reply.content + " edited"}
    assert not is_remembered(chat, [USER, edited, MORE])
    assert not is_remembered(chat, [{"role": "user", "content": "Another"}, *messages[1:]])
    assert not is_remembered(chat, [{"role": "system", "content": "Be short."}, *messages])
    assert not is_remembered(chat, messages, cache_salt="another")
    assert not is_remembered(chat, messages, lora_path="another")
    other = Chat(CHATML, memory=chat.memory, authorization="Bearer b")
    assert not is_remembered(other, messages), "another key"
    assert chat.memory
    assert chat.memory.to_json()["mismatched"] == 0
    changed = Chat(CHATML.replace("{% for", "Today is Monday. {% for", 1), memory=chat.memory)
    assert tuple(changed.prompt(messages).generate.input_ids[:5]) != trajectory.context_ids[:5]
    assert chat.memory.to_json()["mismatched"] == 1, "the template makes another text of the first turn"
    short = Chat(CHATML, memory=chat.memory, max_tokens=len(trajectory.context_ids))
    assert not is_remembered(short, messages), "it would be too long"
    assert is_remembered(chat, messages)


def test_a_reply_without_an_answer_is_remembered_too():
    chat = Chat(CHATML)
    made = chat.prompt([USER])
    options = make_options(
        "threadweaver", tokenizer(), None, budget={"tokens": 81, "width": 2}, mode="parallel"
    )
    ids = tuple(made.generate.input_ids)
    trajectory = next(
        trajectory
        for seed in range(100)
        if not (
            trajectory := asyncio.run(run_with_options(SampledEngine(tokenizer(), seed), ids, options))
        ).answer
    )
    assert trajectory.blocks
    assert made.turn
    made.turn.remember(trajectory, tokenizer())
    for content in ("", None, trajectory.text):
        ids = chat.prompt([USER, {"role": "assistant", "content": content}, MORE]).generate.input_ids
        assert tuple(ids[: len(trajectory.context_ids)]) == trajectory.context_ids


def test_two_replies_to_one_conversation_are_both_remembered():
    chat = Chat(CHATML)
    replies = [chat.turn([USER])[1:] for _ in range(2)]
    for trajectory, reply in replies:
        ids = chat.prompt([USER, assistant(reply, "content"), MORE]).generate.input_ids
        assert tuple(ids[: len(trajectory.context_ids)]) == trajectory.context_ids


def test_a_reply_that_a_stop_string_ended_is_remembered_up_to_there():
    chat = Chat(CHATML, tag_weight=2.0)
    while len(answer := chat.turn([USER])[1].answer) < 9:
        pass
    stop = answer[4:6]
    chat.seed, chat.memory = chat.seed - 1, TurnMemory(MIB)
    _, again, reply = chat.turn([USER], stop=(stop,))
    assert again.answer == answer
    assert reply.content == answer[: answer.index(stop)]
    ids = chat.prompt([USER, assistant(reply, "content"), MORE]).generate.input_ids
    text = tokenizer().decode(ids)
    assert text.startswith(
        tokenizer().decode(again.context_ids).removesuffix(answer) + reply.content + "<|im_end|>"
    )
    kept = len(again.context_ids) - len(tokenizer().encode(answer))
    assert tuple(ids[:kept]) == again.context_ids[:kept]


def test_memory_is_bounded_and_forgets_what_was_used_least_recently():
    prompt = RenderedPrompt.from_text("p")
    turn = RememberedTurn.make(range(1000), (), prompt)
    memory = TurnMemory(3 * turn.size)
    for name in (b"a", b"b", b"c"):
        memory.store(name, turn)
    assert memory.find(b"a")
    memory.store(b"d", turn)
    assert [bool(memory.find(name)) for name in (b"a", b"b", b"c", b"d")] == [True, False, True, True]
    assert memory.to_json() == {
        "entries": 3, "bytes": 3 * turn.size, "max_bytes": 3 * turn.size, "stored": 4, "hits": 0, "misses": 0,
        "mismatched": 0, "evicted": 1,
    }  # fmt: skip
    memory.store(b"large", RememberedTurn.make(range(10_000), (), prompt))
    assert memory.find(b"large") is None, "larger than all of it"
    few = TurnMemory(MIB, max_entries=2)
    for name in (b"a", b"b", b"c"):
        few.store(name, turn)
    assert few.to_json()["entries"] == 2
    off = TurnMemory(0)
    off.store(b"a", turn)
    assert (off.is_on, off.to_json()["entries"]) == (False, 0)


def test_a_turn_keeps_its_ids_and_layout():
    layout = (3, ((2,), (1, ((1,), (2,)), 1)))
    turn = RememberedTurn.make([1, 2**31, 7], layout, RenderedPrompt.from_text("x"))
    assert (turn.token_ids, turn.kv_layout) == ([1, 2**31, 7], layout)
    assert usable_layout(layout, 20) == layout
    assert usable_layout((), 20) == ()
    wide = (3, tuple((1,) for _ in range(5000)))
    assert usable_layout(wide, 6000) == (), "more branches than the cache takes"


@pytest.mark.parametrize("length", [0, 3, 255, 256, 257, 1000])
def test_rendered_prompts_are_compared_from_their_beginning(length: int):
    text = ("ab" * length)[:length] + "é"
    prompt = RenderedPrompt.from_text(text)
    assert prompt.begins_with(text)
    assert prompt.begins_with(text[:-1]), "the template may open the reasoning"
    assert not prompt.begins_with(text + "x")
    assert not prompt.begins_with("x" + text[1:]) or not length
    if length > 300:
        assert not prompt.begins_with(text[:300])
