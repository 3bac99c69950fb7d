"""Checks the options of a request, which are JSON, and makes typed `ReasonOptions` of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from sgl_apr.errors import AprError, BudgetExceeded
from sgl_apr.formats.dialects import Dialect, dialect
from sgl_apr.formats.presets import dialect_for
from sgl_apr.runtime.budget import Budget
from sgl_apr.runtime.option_checks import JSON_OPTION_NAMES, check_option_names, check_options
from sgl_apr.runtime.options import DEFAULT_DIALECT, ReasonOptions
from sgl_apr.runtime.retry import Retry
from sgl_apr.runtime.value_checks import check_type, check_types, drop_nulls, number_types, shorten
from sgl_apr.server.api.chat.prompt import ChatTurn
from sgl_apr.server.api.limits import RequestLimits
from sgl_apr.tokenizer import Tokenizer
from sgl_apr.trajectory.join_layout import Layout

UNKNOWN_TOKEN_CHARS = 256  # of the longest token, for a tokenizer that does not list its tokens
LONG_PROMPT = 16_384  # characters or token ids
MAX_ATTEMPTS = 10  # of one engine request
OPTION_NAMES = ("dialect", *JSON_OPTION_NAMES, "tool_call_parser")


@dataclass(frozen=True, slots=True)
class ReasonRequest:
    """A request for one trajectory. Its prompt and options are still unchecked JSON.

    Attributes:
        prompt: Text or token ids.
        options: Options by name, of `OPTION_NAMES`. A null counts as absent.
        stream: Whether the client wants events while the trajectory is written.
        max_tokens: An upper bound for the tokens of the budget.
        branch_prompt_template: Makes a prompt of the message of a branch that has its own context.
        request_options: Further options that a request has as fields of its own and not in `apr`, such as `stop`.
        layout: How the beginning of the prompt is joined in the KV cache.
        turn: Remembers the reply. None if nothing does.
    """

    prompt: Any
    options: Mapping[str, Any]
    stream: bool = False
    max_tokens: int | None = None
    branch_prompt_template: Callable[[str], str] | None = None
    request_options: Mapping[str, Any] = field(default_factory=dict)
    layout: Layout = ()
    turn: ChatTurn | None = None

    @classmethod
    def from_json(cls, body: bytes) -> ReasonRequest:
        """Return the request in a body of `/apr/generate`: `prompt` or `input_ids`, `stream`, and options.

        Raises:
            AprError: The body is not such an object.
        """
        try:
            # Unlike the standard library, orjson accepts neither NaN nor unpaired surrogates.
            options = drop_nulls(check_type("the body", orjson.loads(body), dict))
        except ValueError as error:
            raise AprError(f"the body is not JSON: {error}") from None
        stream = check_type("stream", options.pop("stream", False), bool)
        prompt, ids = options.pop("prompt", None), options.pop("input_ids", None)
        if prompt is not None and ids is not None:
            raise AprError("expected prompt or input_ids, not both")
        return cls(ids if prompt is None else prompt, options, stream)


@dataclass(frozen=True, slots=True)
class CheckedRequest:
    """A request for one trajectory whose options were checked.

    Attributes:
        prompt: The token ids of the prompt.
        options: The options.
        layout: How the beginning of the prompt is joined in the KV cache.
        turn: Remembers the reply. None if nothing does.
    """

    prompt: tuple[int, ...]
    options: ReasonOptions
    layout: Layout = ()
    turn: ChatTurn | None = None


@dataclass(frozen=True, slots=True)
class OptionsParser:
    """Checks the requests of one server.

    Attributes:
        limits: The operator's limits.
        tokenizer: The tokenizer of the served model.
        context_length: Tokens of the model's context.
        vocab_size: Number of token ids that the model has.
        max_token_chars: Characters of the longest token.
    """

    limits: RequestLimits
    tokenizer: Tokenizer
    context_length: int
    vocab_size: int
    max_token_chars: int = UNKNOWN_TOKEN_CHARS

    async def parse_in_thread(self, request: ReasonRequest) -> tuple[tuple[int, ...], ReasonOptions]:
        """Parse a request. A long prompt is encoded in a thread, so that other requests do not wait for it.

        Raises:
            AprError: Same as for `parse`.
        """
        is_long = isinstance(request.prompt, str | list) and len(request.prompt) > LONG_PROMPT
        return await asyncio.to_thread(self.parse, request) if is_long else self.parse(request)

    def parse(self, request: ReasonRequest) -> tuple[tuple[int, ...], ReasonOptions]:
        """Return the prompt's token ids and the options of a request.

        Raises:
            AprError: An option has an unknown name, a wrong type or a value that is not possible. The message says
                what was expected.
        """
        prompt = self.prompt_ids(request.prompt)
        options = drop_nulls(request.options)
        check_option_names(options, OPTION_NAMES, known_elsewhere=("tools",))
        dialect_ = self._dialect(options.pop("dialect", None))
        budget = self._check_budget(options.pop("budget", {}), request.max_tokens)
        checked = check_options({**options, **request.request_options}, self.vocab_size)
        retry = checked.get("retry", Retry())
        if retry.attempts > MAX_ATTEMPTS:
            raise AprError(f"retry attempts={retry.attempts}, expected at most {MAX_ATTEMPTS}")
        if dialect_.branch_context == "message":
            checked["branch_prompt_template"] = request.branch_prompt_template
        return prompt, ReasonOptions(
            dialect_,
            self.limits.budget(budget, dialect_, self.context_length - len(prompt) - 1),
            **checked,
        )

    @staticmethod
    def _check_budget(fields: Any, max_tokens: Any) -> dict[str, Any]:
        """Return the fields of `Budget` that a request sets. `max_tokens` bounds the tokens."""
        budget = check_types(check_type("budget", fields, dict), number_types(Budget), "budget ")
        if max_tokens is not None:
            check_type("max_tokens", max_tokens, int)
            budget["tokens"] = min(max_tokens, budget.get("tokens", max_tokens))
        return budget

    def prompt_ids(self, prompt: Any) -> tuple[int, ...]:
        """Return the token ids of one prompt.

        Its length is checked before anything reads it. Ids outside of the vocabulary would end SGLang's scheduler.
        """
        if isinstance(prompt, str):
            self._check_length(len(prompt), "characters", self.context_length * self.max_token_chars)
            ids = self.tokenizer.encode(prompt, add_special_tokens=True)
        else:
            ids = prompt
        if not (isinstance(ids, list) and ids):
            raise AprError(
                f"the prompt is {shorten(prompt)}, expected one prompt: text, or a list of token ids"
            )
        self._check_length(len(ids), "tokens", self.context_length - 1)
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise AprError("expected one prompt: text, or a list of token ids")
        if not all(0 <= i < self.vocab_size for i in ids):
            raise AprError(f"the prompt has token ids outside of the vocabulary: 0 to {self.vocab_size - 1}")
        return tuple(ids)

    def _check_length(self, length: int, unit: str, limit: int) -> None:
        if length > limit:
            context = f"the context of the model, which has {self.context_length} tokens"
            raise BudgetExceeded(f"the prompt has {length} {unit}, expected at most {limit}: {context}")

    def _dialect(self, name: Any) -> Dialect:
        if name is None:
            return dialect_for(self.tokenizer) or dialect(DEFAULT_DIALECT)
        return dialect(name)
