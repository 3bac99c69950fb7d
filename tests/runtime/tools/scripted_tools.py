"""Scripted models that call tools, and a chat template in Qwen's form."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import sgl_apr as apr
from tests.support.threadweaver_traces import TAGS

CHAT_TAGS = ("<|im_start|>", "<|im_end|>", "<tool_response>", "</tool_response>")
FORK = "<Parallel>\n<Outlines>\n<Outline>1: left</Outline>\n<Outline>2: right</Outline>\n</Outlines>"
JOINED = "<Conclusion>both</Conclusion>\n</Parallel>\n\nDone."
TURN = "<|im_end|>\n<|im_start|>assistant\n"
BEFORE, AFTER = "<|im_end|>\n<|im_start|>user\n<tool_response>\n", f"\n</tool_response>{TURN}"


class ChatTokenizer(apr.ByteTokenizer):
    """Bytes, tags, and the chat template of Qwen 2.5."""

    def __init__(self, tags: tuple[str, ...] = (*TAGS, *CHAT_TAGS)) -> None:
        super().__init__(tags)
        self.rendered = 0

    def apply_chat_template(self, messages: list[dict[str, Any]], **options: Any) -> str:
        self.rendered += 1
        text, previous = "", ""
        if tools := options.get("tools"):
            text = "<|im_start|>system\n" + "\n".join(map(json.dumps, tools))
            text += '\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n'
        for k, message in enumerate(messages):
            role = message["role"]
            if role == "tool":
                text += "" if previous == "tool" else "<|im_start|>user"
                text += f"\n<tool_response>\n{message['content']}\n</tool_response>"
                following = messages[k + 1]["role"] if k + 1 < len(messages) else ""
                text += "" if following == "tool" else "<|im_end|>\n"
            else:
                text += f"<|im_start|>{role}\n{message['content']}"
                for called in message.get("tool_calls") or ():
                    function = called["function"]
                    if isinstance(function["arguments"], str):
                        raise ValueError("expected an object")
                    text += "" if text.endswith("\n") else "\n"
                    text += call(function["name"], **function["arguments"])
                text += "<|im_end|>\n"
            previous = role
        return text + "<|im_start|>assistant\n"


def call(name: str, **arguments: Any) -> str:
    """A call in Qwen's form."""
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def engine(script: dict[str, Any] | Callable[..., Any], tokenizer: Any = None) -> apr.ScriptedEngine:
    """An engine whose reply is that of the longest key with which the prompt ends."""
    if not callable(script):
        table = sorted(script.items(), key=lambda item: -len(item[0]))

        def reply(request: apr.Request, prompt: str) -> Any:
            return next(value for key, value in table if prompt.endswith(key))
    else:
        reply = script
    return apr.ScriptedEngine(reply, tokenizer or apr.ByteTokenizer(TAGS))


def reason(scripted: apr.ScriptedEngine, prompt: Any = "Q: ", **options: Any) -> apr.Trajectory:
    """The trajectory, which its events have to make as well."""
    events: list[apr.Event] = []
    options = {"tool_call_parser": "qwen25", "budget": "tokens=4000", **options}
    trajectory = asyncio.run(apr.areason(scripted, prompt, on_event=events.append, **options))
    assert apr.rebuild(events) == trajectory
    assert apr.Trajectory.from_json(trajectory.to_json()) == trajectory
    assert scripted.active == set()
    return trajectory


def outcomes(trajectory: apr.Trajectory) -> dict[str, str]:
    return {called.id: called.outcome for called in trajectory.tool_calls}
