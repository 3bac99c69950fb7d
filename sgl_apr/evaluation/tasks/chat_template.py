"""How a model is spoken to: what stands around a message, and behind a reply; no other template is rendered."""

from __future__ import annotations

from dataclasses import dataclass

from sgl_apr.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """before, after: what stands around a user's message, up to where the reply begins. end: behind the reply."""

    before: str
    after: str
    end: str

    def turn(self, message: str, *, first: bool = True) -> str:
        """What a user says; `first`: no reply stands before it.

        >>> CHATML.turn("Why?")
        '<|im_start|>user\\nWhy?<|im_end|>\\n<|im_start|>assistant\\n'
        """
        return f"{'' if first else self.end}{self.before}{message}{self.after}"


CHATML = ChatTemplate("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>\n")
PLAIN = ChatTemplate("", "\n\n", "\n\n")  # for models that know no turns


def chat_of(tokenizer: Tokenizer) -> ChatTemplate:
    """ChatML for a tokenizer that has its tags, else plain text."""
    return PLAIN if tokenizer.special("<|im_start|>") is None else CHATML
