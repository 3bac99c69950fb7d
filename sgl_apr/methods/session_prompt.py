"""Encodes the prompt that a run of a method begins with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from sgl_apr.engine.base import Engine
from sgl_apr.methods.method_tools import ToolHeading, tool_heading
from sgl_apr.methods.prompt import Prompt
from sgl_apr.runtime.prompts import Prompt as PromptInput
from sgl_apr.runtime.prompts import check_engine, check_prompt, encode_prompt


async def session_prompt(
    engine: Engine, prompt: PromptInput | Prompt, options: Mapping[str, Any]
) -> tuple[ToolHeading | None, str | Sequence[int]]:
    """Check a prompt, and encode it with what it shows of the tools.

    Args:
        engine: Decodes.
        prompt: Text, token ids, chat messages, or what a task made.
        options: The options of the session.

    Returns:
        How further prompts show the tools, and the prompt: text, or its token ids.

    Raises:
        AprError: The prompt is wrong.
    """
    check_engine(engine)
    check_prompt(prompt.text if isinstance(prompt, Prompt) else prompt)
    heading = await tool_heading(engine, options)
    if isinstance(prompt, str):
        return heading, heading.shown(prompt) if heading else prompt
    if isinstance(prompt, Prompt):
        shown = replace(prompt, text=heading.shown(prompt.text)) if heading else prompt
        return heading, shown.encode(engine.tokenizer, add_special_tokens=True)
    return heading, await encode_prompt(engine, prompt, heading.tools if heading else None)
