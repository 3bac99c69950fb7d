"""How a model is spoken to: what stands around a message, and behind a reply; no other template is rendered."""

from __future__ import annotations

from dataclasses import dataclass

from sgl_apr.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """before, after: what stands around a user's message, up to where the reply begins. end: behind the reply."""

    user_prefix: str
    user_suffix: str
    reply_suffix: str

    def turn(self, message: str, *, first: bool = True) -> str:
        """What a user says; `first`: no reply stands before it.

        >>> CHATML.turn("Why?")
        '<|im_start|>user\\nWhy?<|im_end|>\\n<|im_start|>assistant\\n'
        """
        return f"{'' if first else self.reply_suffix}{self.user_prefix}{message}{self.user_suffix}"


CHATML = ChatTemplate("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>\n")
PLAIN = ChatTemplate("", "\n\n", "\n\n")  # for models that know no turns


def chat_template_for(tokenizer: Tokenizer) -> ChatTemplate:
    """ChatML for a tokenizer that has its tags, else plain text."""
    return PLAIN if tokenizer.special_token_id("<|im_start|>") is None else CHATML
