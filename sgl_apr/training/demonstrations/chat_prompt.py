"""How a message is put to SmolLM2: with its own system message, or without one, as other callers do."""

from __future__ import annotations

import random

from sgl_apr.evaluation.tasks.chat_template import CHATML

SYSTEM_MESSAGE = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
SYSTEM_SHARE = 0.7  # of the messages


def chat_prompt(message: str, *, system: bool | None = None) -> str:
    """The prompt of a message.

    Args:
        message: The message.
        system: Whether it begins with the system message that the model's template adds where there is none. None draws that by
            the message, so that one message always has one prompt.

    Examples:
        >>> chat_prompt("Why?", system=False)
        '<|im_start|>user\\nWhy?<|im_end|>\\n<|im_start|>assistant\\n'
    """
    if system is None:
        system = random.Random(message).random() < SYSTEM_SHARE
    head = f"<|im_start|>system\n{SYSTEM_MESSAGE}<|im_end|>\n" if system else ""
    return head + CHATML.turn(message)
