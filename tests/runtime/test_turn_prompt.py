"""The prompt of the next turn, made by the client of any engine."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import sgl_apr as apr
from tests.support.chat_templates import CHATML, QWEN, TAGS, TRIMMED, ChatTokenizer, compiled
from tests.support.masked_sampler import Masked, SampledEngine

USER = {"role": "user", "content": "Why?"}
MORE = {"role": "user", "content": "And </Thread> now?"}


class ChatMasked(Masked):
    """A tokenizer with the tags of a dialect and a chat template."""

    def __init__(self, template: str) -> None:
        super().__init__(tuple(dict.fromkeys([*apr.dialect("threadweaver").tags, *TAGS])))
        self.template = template

    def apply_chat_template(self, messages: Any, *, tokenize: bool, **variables: Any) -> str:
        return compiled(self.template).render(messages=messages, **variables)


@pytest.mark.parametrize("template", [CHATML, QWEN, TRIMMED])
@pytest.mark.parametrize("sends", ["answer", "text"])
def test_it_begins_with_the_ids_of_the_turn_before(template: str, sends: str):
    engine = SampledEngine(ChatMasked(template), seed=3)

    async def turns() -> None:
        messages: list[dict[str, Any]] = [USER]
        prompt: Any = messages
        for _ in range(3):
            trajectory = await apr.areason(
                engine, prompt, "threadweaver", budget={"tokens": 600, "width": 3}, mode="parallel"
            )
            messages += [{"role": "assistant", "content": getattr(trajectory, sends)}, MORE]
            prompt = await apr.next_turn(engine, trajectory, messages)
            context = trajectory.context_ids
            assert prompt[: len(context)] == context
            rest = prompt[len(context) :]
            expected = "<|im_end|>\n<|im_start|>user\nAnd </Thread> now?<|im_end|>\n<|im_start|>assistant\n"
            assert engine.tokenizer.decode(rest) == expected
            assert engine.tokenizer.special_token_id("</Thread>") not in rest

    asyncio.run(turns())


def test_what_is_no_next_turn_is_an_error():
    engine = apr.ScriptedEngine(lambda request, prompt: "42", ChatTokenizer(CHATML))

    def after(messages: list[dict[str, Any]], engine: apr.ScriptedEngine = engine) -> Any:
        async def both() -> Any:
            return await apr.next_turn(
                engine, await apr.areason(engine, [USER], budget={"tokens": 9}), messages
            )

        return asyncio.run(both())

    assert after([USER, {"role": "assistant", "content": "42"}, MORE])
    for messages in ([USER, {"role": "assistant", "content": "43"}, MORE], [USER]):
        with pytest.raises(apr.AprError, match="is not the reply of the trajectory before"):
            after(messages)
    for template, why in (
        (
            CHATML.replace("message['content']", "message['content'] | upper"),
            "does not write the reply as it is",
        ),
        ("{{ messages[-1].content }}", "does not write the reply as it is"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "no token of its own|And"),
    ):
        other = apr.ScriptedEngine(lambda request, prompt: "42", ChatTokenizer(template))
        if "no token" in why:  # bytes have no merges, so any text can follow
            assert after([USER, {"role": "assistant", "content": "42"}, MORE], other)
            continue
        with pytest.raises(apr.AprError, match=why):
            after([USER, {"role": "assistant", "content": "42"}, MORE], other)
