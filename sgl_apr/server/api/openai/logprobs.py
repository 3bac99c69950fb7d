"""Log-probabilities of the tokens of a reply, in the shapes of OpenAI's chat completions and text completions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sgl_apr.server.api.openai.reply import ReplyText
from sgl_apr.tokenizer import HfTokenizer, Tokenizer
from sgl_apr.trajectory.calls import TopLogprobs
from sgl_apr.trajectory.spans import Span
from sgl_apr.trajectory.trajectory import Trajectory

REPLACEMENT = "\ufffd"  # in place of bytes that are no complete character


@dataclass(frozen=True, slots=True)
class ReplyToken:
    """A token of a reply.

    Attributes:
        id: Its token id.
        start: Where its text begins in the reply. Tokens that share a character have one start and one end.
        end: Where its text ends.
        logprob: Its log-probability; None if it was injected.
        top: The most likely tokens in its place.
    """

    id: int
    start: int
    end: int
    logprob: float | None
    top: TopLogprobs


@dataclass(frozen=True, slots=True)
class LogprobsBuilder:
    """Builds the field `logprobs` of a choice.

    Attributes:
        tokenizer: Of the model.
        top_logprobs: How many alternatives of each token there are.
    """

    tokenizer: Tokenizer
    top_logprobs: int = 0

    def chat(self, trajectory: Trajectory, reply: ReplyText) -> dict[str, Any]:
        """Return the field of a chat completion: the tokens of the content that the model decoded.

        Injected tokens, as those that close a text that was cut, have no log-probability and are left out.
        """
        content = [
            {
                **self._token(token.id, token.logprob),
                "top_logprobs": [self._token(one.token_id, one.logprob) for one in token.top],
            }
            for token in self._content_tokens(trajectory, reply)
            if token.logprob is not None
        ]
        return {"content": content, "refusal": None}

    def text(self, trajectory: Trajectory, reply: ReplyText) -> dict[str, Any]:
        """Return the field of a text completion: all tokens of the text. Those that were injected have null."""
        tokens = list(self._content_tokens(trajectory, reply))
        start = len(reply.reasoning)
        return {
            "tokens": [self.tokenizer.decode([token.id]) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [
                {self.tokenizer.decode([one.token_id]): one.logprob for one in token.top}
                if token.top
                else None
                for token in tokens
            ],
            "text_offset": [max(0, token.start - start) for token in tokens],
        }

    def _token(self, token_id: int, logprob: float | None) -> dict[str, Any]:
        text = self.tokenizer.decode([token_id])
        data: bytes | None = text.encode()
        if REPLACEMENT in text:  # a token that is a part of a character has no text of its own
            data = self.tokenizer.token_bytes(token_id) if isinstance(self.tokenizer, HfTokenizer) else None
        return {"token": text, "logprob": logprob, "bytes": None if data is None else list(data)}

    def _content_tokens(self, trajectory: Trajectory, reply: ReplyText) -> Iterator[ReplyToken]:
        start = len(reply.reasoning)
        end = start + len(reply.content)
        for token in self._tokens(trajectory):
            if token.start < end and token.end > start:
                yield token

    def _tokens(self, trajectory: Trajectory) -> Iterator[ReplyToken]:
        """Yield the tokens of `Trajectory.text`."""
        decoded: dict[int, int] = {}  # tokens of each call so far
        in_reply = set(map(id, trajectory.reply_spans))
        position = 0
        for span in trajectory.spans:
            first = 0
            if span.call is not None:
                first = decoded.get(span.call, 0)
                decoded[span.call] = first + span.tokens
            if id(span) in in_reply:
                yield from self._span_tokens(trajectory, span, first, position)
                position += len(span.text)

    def _span_tokens(
        self, trajectory: Trajectory, span: Span, first: int, position: int
    ) -> Iterator[ReplyToken]:
        """Yield the tokens of a span.

        Args:
            trajectory: The trajectory.
            span: One of its spans.
            first: How many tokens of its call come before it.
            position: Where its text begins.
        """
        call = None if span.call is None else trajectory.calls[span.call]
        logprobs = None if call is None else call.logprobs
        top = None if call is None else call.top_logprobs
        context: tuple[int, ...] = ()
        pending: list[int] = []
        begin, limit = position, position + len(span.text)
        ids = span.token_ids or ()
        for k, token_id in enumerate(ids):
            pending.append(token_id)
            text = self.tokenizer.decode(pending, context)
            if text.endswith(REPLACEMENT) and k + 1 < len(ids):
                continue
            end = min(limit, begin + len(text)) if k + 1 < len(ids) else limit
            for index in range(k + 1 - len(pending), k + 1):
                n = first + index
                yield ReplyToken(
                    ids[index], begin, end,
                    logprobs[n] if logprobs is not None and n < len(logprobs) else None,
                    top[n][: self.top_logprobs] if top and n < len(top) else (),
                )  # fmt: skip
            context, pending, begin = (*context[-4:], *pending), [], end
