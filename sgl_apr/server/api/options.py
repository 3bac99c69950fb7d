"""What a request asks for, as JSON, made into a plan; every name and type is checked, nothing is evaluated."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from sgl_apr.errors import AprError, GrammarError
from sgl_apr.formats.dialects import Dialect, dialect, dialect_names
from sgl_apr.formats.presets import dialect_for
from sgl_apr.runtime.budget import Budget
from sgl_apr.runtime.options import DEFAULT_DIALECT, REQUEST_FIELDS, ReasonOptions
from sgl_apr.runtime.pacing import Pacing
from sgl_apr.runtime.retry import Retry
from sgl_apr.server.api.limits import RequestLimits
from sgl_apr.tokenizer import Tokenizer

T = TypeVar("T")
ATTEMPTS = 10  # of one request, at most
TYPE_NAMES: Mapping[type, str] = {
    str: "a string", int: "a whole number", float: "a number", bool: "true or false", dict: "an object",
}  # fmt: skip
OPTIONS: Mapping[str, type] = {
    "join": str, "mode": str, "min_blocks": int, "max_blocks": int, "min_width": int, "policy": str,
    "cap_width_by_load": bool, "on_branch_failure": str, "seed": int, "constrain": bool, "forbid_angle_brackets": bool,
    "logprobs": bool,
}  # fmt: skip
SAMPLING: Mapping[str, type] = {
    "temperature": float, "top_p": float, "top_k": int, "min_p": float, "frequency_penalty": float,
    "presence_penalty": float, "repetition_penalty": float, "logit_bias": dict,
}  # fmt: skip
REQUEST: Mapping[str, type] = {name: int if name == "priority" else str for name in REQUEST_FIELDS}
OBJECTS = ("budget", "pacing", "retry", "sampling")
NAMES = ("dialect", *OBJECTS, *OPTIONS, *SAMPLING, *REQUEST)


@dataclass(frozen=True, slots=True)
class RequestParser:
    """What plans are made with here: the operator's caps, the served tokenizer, context length and vocabulary."""

    caps: RequestLimits
    tokenizer: Tokenizer
    context: int
    vocabulary: int

    def plan(
        self,
        options: Mapping[str, Any],
        prompt_tokens: int,
        *,
        most: int | None = None,
        wrap: Callable[[str], str] | None = None,
    ) -> ReasonOptions:
        """The plan of these options (`NAMES`; null is as good as absent) behind a prompt of so many tokens.

        most: tokens of the reply at most, beside what the budget says. Raises an `AprError` that says what
        is wrong and what would be right.
        """
        options = drop_nulls(options)
        for name in options:
            if name not in NAMES:
                raise AprError(f"no option {name!r}, expected some of {', '.join(NAMES)}")
        chosen = self._dialect(options.get("dialect"))
        limits = _numbers(Budget, "budget", options.get("budget", {}))
        if most is not None:
            limits["tokens"] = min(most, limits.get("tokens", most))
        retry = _build_dataclass(Retry, "retry", options)
        if retry.attempts > ATTEMPTS:
            raise AprError(f"retry attempts={retry.attempts}, expected at most {ATTEMPTS}")
        sampling = check_type("sampling", options.get("sampling", {}), dict)
        return ReasonOptions(
            chosen,
            self.caps.budget(limits, chosen, self.context - prompt_tokens - 1),
            pacing=_build_dataclass(Pacing, "pacing", options),
            retry=retry,
            branch_prompt_template=wrap if chosen.branch_context == "message" else None,
            sampling=_checked(sampling, SAMPLING, "sampling ") | _select(options, SAMPLING),
            request_fields=_select(options, REQUEST),
            **_select(options, OPTIONS),
        )

    def prompt(self, prompt: Any) -> tuple[int, ...]:
        """The ids of one prompt, text or ids; raises `AprError` for anything else, and for ids that the model
        does not have: they would end the scheduler."""
        ids = self.tokenizer.encode(prompt, first=True) if isinstance(prompt, str) else prompt
        whole = isinstance(ids, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in ids)
        if not (whole and ids):
            raise AprError("expected one prompt: text, or a list of token ids")
        if not all(0 <= i < self.vocabulary for i in ids):
            raise AprError(f"the prompt has token ids outside of the vocabulary: 0 to {self.vocabulary - 1}")
        return tuple(ids)

    def _dialect(self, name: Any) -> Dialect:
        if name is None:
            return dialect_for(self.tokenizer) or dialect(DEFAULT_DIALECT)
        if name not in dialect_names():  # and never a path
            raise GrammarError(f"no dialect {_short(name)}, expected one of {', '.join(dialect_names())}")
        return dialect(name)


def drop_nulls(values: Mapping[str, Any]) -> dict[str, Any]:
    """Without those that are null."""
    return {name: value for name, value in values.items() if value is not None}


def check_type(where: str, value: Any, kind: type[T]) -> T:
    """The value, if it is of that kind; raises `AprError`."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    fits = isinstance(value, kind) and (number or kind not in (int, float))
    if not (fits or (kind is float and number)):
        raise AprError(f"{where}={_short(value)}, expected {TYPE_NAMES[kind]}")
    return value  # type: ignore[no-any-return]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _checked(values: Mapping[str, Any], kinds: Mapping[str, type], where: str) -> dict[str, Any]:
    for name in values:
        if name not in kinds:
            raise AprError(f"no {where}{_short(name)}, expected some of {', '.join(kinds)}")
    return {name: check_type(where + name, value, kinds[name]) for name, value in drop_nulls(values).items()}


def _select(options: Mapping[str, Any], kinds: Mapping[str, type]) -> dict[str, Any]:
    return _checked({name: value for name, value in options.items() if name in kinds}, kinds, "")


def _numbers(kind: type, where: str, values: Any) -> dict[str, Any]:
    """The fields of a dataclass of numbers."""
    kinds: dict[str, type] = {f.name: float if str(f.type).startswith("float") else int for f in fields(kind)}
    return _checked(check_type(where, values, dict), kinds, f"{where} ")


def _build_dataclass(kind: type[T], where: str, options: Mapping[str, Any]) -> T:
    return kind(**_numbers(kind, where, options.get(where, {})))
