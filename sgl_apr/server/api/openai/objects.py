"""The parts that complete and streamed responses of OpenAI's API have in common."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from sgl_apr.server.api.openai.logprobs import LogprobsBuilder
from sgl_apr.server.api.openai.reply import ReplyText, split_reply
from sgl_apr.server.api.openai.response_options import ResponseOptions
from sgl_apr.tokenizer import Tokenizer
from sgl_apr.trajectory.trajectory import Trajectory


@dataclass(frozen=True, slots=True)
class ResponseObjects:
    """Build the objects that belong to one response.

    Attributes:
        model: The model's name, as the request has it.
        chat: Whether to build chat completions or text completions.
        options: How the response should look.
        tokenizer: Of the model, for log-probabilities.
        id: The response's id, without its prefix.
        created: Seconds since 1970.
    """

    model: str
    chat: bool
    options: ResponseOptions
    tokenizer: Tokenizer | None = None
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def split(self, trajectory: Trajectory) -> ReplyText:
        """Split the text of a trajectory into reasoning and content."""
        options = self.options
        return split_reply(trajectory, separate_reasoning=options.separate_reasoning, stop=options.stop)

    def logprobs(self, trajectory: Trajectory, reply: ReplyText) -> dict[str, Any] | None:
        """Return the field `logprobs` of a choice, or None if the request does not ask for it."""
        if not self.options.logprobs or self.tokenizer is None:
            return None
        builder = LogprobsBuilder(self.tokenizer, self.options.top_logprobs)
        return builder.chat(trajectory, reply) if self.chat else builder.text(trajectory, reply)

    def chunk(
        self,
        index: int,
        body: dict[str, Any],
        apr: dict[str, Any] | None = None,
        finish: str | None = None,
        logprobs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return a chunk of one choice.

        Args:
            index: The index of the choice.
            body: The delta of a chat completion, or the text of a text completion.
            apr: The field `apr`, if the chunk has one.
            finish: The finish reason.
            logprobs: The log-probabilities of the text.
        """
        body = {"delta": body} if self.chat else body
        chunk = {
            **self.head("chat.completion.chunk"),
            "choices": [choice_object(index, body, finish, logprobs)],
        }
        if self.options.include_usage:
            chunk["usage"] = None
        return chunk if apr is None else {**chunk, "apr": apr}

    def head(self, chat_object: str) -> dict[str, Any]:
        """Return the fields with which an object begins. `chat_object` is the name of its type for a chat."""
        prefix, object_ = ("chatcmpl", chat_object) if self.chat else ("cmpl", "text_completion")
        return {"id": f"{prefix}-{self.id}", "object": object_, "created": self.created, "model": self.model}


def choice_object(
    index: int, body: dict[str, Any], finish: str | None, logprobs: dict[str, Any] | None
) -> dict[str, Any]:
    """Return a choice of a response or of a chunk."""
    return {"index": index, **body, "logprobs": logprobs, "finish_reason": finish}
