"""Checks the options of a request, which are JSON, and makes typed `ReasonOptions` of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import orjson

from sgl_apr.errors import AprError, GrammarError
from sgl_apr.formats.dialects import Dialect, dialect, dialect_names
from sgl_apr.formats.presets import dialect_for
from sgl_apr.runtime.budget import Budget
from sgl_apr.runtime.options import DEFAULT_DIALECT, REQUEST_FIELDS, ReasonOptions
from sgl_apr.runtime.pacing import Pacing
from sgl_apr.runtime.retry import Retry
from sgl_apr.runtime.value_checks import (
    SAMPLING_TYPES,
    check_sampling,
    check_type,
    check_types,
    drop_nulls,
    shorten,
)
from sgl_apr.server.api.limits import RequestLimits
from sgl_apr.tokenizer import Tokenizer

MAX_ATTEMPTS = 10  # of one engine request
OPTION_TYPES: Mapping[str, type] = {
    "join": str, "mode": str, "min_blocks": int, "max_blocks": int, "min_width": int, "policy": str,
    "cap_width_by_load": bool, "on_branch_failure": str, "seed": int, "constrain": bool, "forbid_angle_brackets": bool,
    "logprobs": bool,
}  # fmt: skip
REQUEST_FIELD_TYPES: Mapping[str, type] = {n: int if n == "priority" else str for n in REQUEST_FIELDS}
OPTION_NAMES = (
    "dialect", "budget", "pacing", "retry", "sampling", *OPTION_TYPES, *SAMPLING_TYPES, *REQUEST_FIELD_TYPES,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ReasonRequest:
    """A request for one trajectory. Its prompt and options are still unchecked JSON.

    Attributes:
        prompt: Text or token ids.
        options: Options by name, of `OPTION_NAMES`. A null counts as absent.
        stream: Whether the client wants events while the trajectory is written.
        max_tokens: An upper bound for the tokens of the budget.
        branch_prompt_template: Makes a prompt of the message of a branch that has its own context.
    """

    prompt: Any
    options: Mapping[str, Any]
    stream: bool = False
    max_tokens: int | None = None
    branch_prompt_template: Callable[[str], str] | None = None

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
class OptionsParser:
    """Checks the requests of one server.

    Attributes:
        limits: The operator's limits.
        tokenizer: The tokenizer of the served model.
        context_length: Tokens of the model's context.
        vocab_size: Number of token ids that the model has.
    """

    limits: RequestLimits
    tokenizer: Tokenizer
    context_length: int
    vocab_size: int

    def parse(self, request: ReasonRequest) -> tuple[tuple[int, ...], ReasonOptions]:
        """Return the prompt's token ids and the options of a request.

        Raises:
            AprError: An option has an unknown name, a wrong type or a value that is not possible. The message says
                what was expected.
        """
        prompt = self._prompt_ids(request.prompt)
        options = drop_nulls(request.options)
        for name in options:
            if name not in OPTION_NAMES:
                raise AprError(f"no option {name!r}, expected some of {', '.join(OPTION_NAMES)}")
        dialect_ = self._dialect(options.get("dialect"))
        budget = _check_numbers(Budget, "budget", options)
        if request.max_tokens is not None:
            check_type("max_tokens", request.max_tokens, int)
            budget["tokens"] = min(request.max_tokens, budget.get("tokens", request.max_tokens))
        retry = Retry(**_check_numbers(Retry, "retry", options))
        if retry.attempts > MAX_ATTEMPTS:
            raise AprError(f"retry attempts={retry.attempts}, expected at most {MAX_ATTEMPTS}")
        sampling = check_type("sampling", options.get("sampling", {}), dict)
        return prompt, ReasonOptions(
            dialect_,
            self.limits.budget(budget, dialect_, self.context_length - len(prompt) - 1),
            pacing=Pacing(**_check_numbers(Pacing, "pacing", options)),
            retry=retry,
            branch_prompt_template=(
                request.branch_prompt_template if dialect_.branch_context == "message" else None
            ),
            sampling=(
                check_sampling(sampling, self.vocab_size, "sampling ")
                | check_sampling(_select(options, SAMPLING_TYPES), self.vocab_size)
            ),
            request_fields=_select(options, REQUEST_FIELD_TYPES),
            **_select(options, OPTION_TYPES),
        )

    def _prompt_ids(self, prompt: Any) -> tuple[int, ...]:
        """Return the token ids of one prompt. Ids outside of the vocabulary would end SGLang's scheduler."""
        ids = self.tokenizer.encode(prompt, add_special_tokens=True) if isinstance(prompt, str) else prompt
        all_ints = isinstance(ids, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in ids)
        if not (all_ints and ids):
            raise AprError("expected one prompt: text, or a list of token ids")
        if not all(0 <= i < self.vocab_size for i in ids):
            raise AprError(f"the prompt has token ids outside of the vocabulary: 0 to {self.vocab_size - 1}")
        return tuple(ids)

    def _dialect(self, name: Any) -> Dialect:
        if name is None:
            return dialect_for(self.tokenizer) or dialect(DEFAULT_DIALECT)
        if name not in dialect_names():  # `dialect` also loads files by path, which a client must not do
            raise GrammarError(f"no dialect {shorten(name)}, expected one of {', '.join(dialect_names())}")
        return dialect(name)


def _select(options: Mapping[str, Any], types: Mapping[str, type]) -> dict[str, Any]:
    return check_types({name: value for name, value in options.items() if name in types}, types, "")


def _check_numbers(kind: type, name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the option `name`, an object with fields of the dataclass `kind`, all of which are numbers."""
    types: dict[str, type] = {f.name: float if str(f.type).startswith("float") else int for f in fields(kind)}
    return check_types(check_type(name, options.get(name, {}), dict), types, f"{name} ")
