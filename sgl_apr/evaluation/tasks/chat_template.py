"""How a message is put to a model: the text around a user's message, and after a reply."""

from __future__ import annotations

from dataclasses import dataclass

from sgl_apr.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A chat template without roles other than user and assistant.

    Attributes:
        user_prefix: Text before a user's message.
        user_suffix: Text after it, up to the start of the reply.
        reply_suffix: Text after a reply.
        quoted: What users and models have said in these texts.
    """

    user_prefix: str
    user_suffix: str
    reply_suffix: str
    quoted: tuple[str, ...] = ()

    def turn(self, message: str, *, first: bool = True) -> str:
        """A user's message; `first` means that no reply comes before it.

        Examples:
            >>> CHATML.turn("Why?")
            '<|im_start|>user\\nWhy?<|im_end|>\\n<|im_start|>assistant\\n'
        """
        return f"{'' if first else self.reply_suffix}{self.user_prefix}{message}{self.user_suffix}"


CHATML = ChatTemplate("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>\n")
PLAIN = ChatTemplate("", "\n\n", "\n\n")  # for models without a chat format


def chat_template_for(tokenizer: Tokenizer) -> ChatTemplate:
    """ChatML for a tokenizer that has its tags, else plain text."""
    return PLAIN if tokenizer.special_token_id("<|im_start|>") is None else CHATML
