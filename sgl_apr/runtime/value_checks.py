"""Checks the types and the values of options, for Python and for HTTP.

SGLang's scheduler, and the server with it, ends with some values that SGLang does not refuse itself. So every value is
checked before a request is sent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from functools import cache
from reprlib import Repr
from typing import Any, TypeVar

from sgl_apr.errors import AprError, did_you_mean

T = TypeVar("T")
_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 100
TYPE_NAMES: Mapping[type, str] = {
    str: "a string", int: "a whole number", float: "a number", bool: "true or false", dict: "an object",
}  # fmt: skip
SAMPLING_TYPES: Mapping[str, type] = {
    "temperature": float, "top_p": float, "top_k": int, "min_p": float, "frequency_penalty": float,
    "presence_penalty": float, "repetition_penalty": float, "logit_bias": dict,
}  # fmt: skip
# SGLang keeps sampling values in float32 tensors, and top_k in an int32 tensor.
MAX_TEMPERATURE = 3e38
MIN_TOP_P = 1.2e-38
MAX_TOP_K = 2**31 - 1
# A logit may be divided by the repetition penalty or increased by the bias, and then divided by a temperature of 1e-6 or
# more. With these bounds it stays finite. An infinite logit makes a probability NaN, which ends the scheduler.
MIN_REPETITION_PENALTY = 1e-6
MAX_LOGIT_BIAS = 1e20
MAX_VOCAB_SIZE = 2**31  # token ids are 32-bit numbers
# The ranges of `SamplingParams.verify` of SGLang 0.5.23, within the bounds above.
SAMPLING_RANGES: Mapping[str, tuple[Callable[[float], bool], str]] = {
    "temperature": (lambda v: 0 <= v <= MAX_TEMPERATURE, f"a number from 0 to {MAX_TEMPERATURE}"),
    "top_p": (lambda v: MIN_TOP_P <= v <= 1, f"a number above 0, at most 1 (and at least {MIN_TOP_P})"),
    "top_k": (lambda v: v == -1 or 1 <= v <= MAX_TOP_K, f"-1 or a whole number from 1 to {MAX_TOP_K}"),
    "min_p": (lambda v: 0 <= v <= 1, "a number from 0 to 1"),
    "frequency_penalty": (lambda v: -2 <= v <= 2, "a number from -2 to 2"),
    "presence_penalty": (lambda v: -2 <= v <= 2, "a number from -2 to 2"),
    "repetition_penalty": (
        lambda v: MIN_REPETITION_PENALTY <= v <= 2, f"a number from {MIN_REPETITION_PENALTY} to 2",
    ),
}  # fmt: skip


def drop_nulls(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that are not null."""
    return {name: value for name, value in values.items() if value is not None}


def check_type(name: str, value: Any, kind: type[T], error: type[AprError] = AprError) -> T:
    """Return the value if it has this type. A whole number is also a float, but a bool is never a number.

    Args:
        name: What the message calls the value.
        value: The value.
        kind: A type of `TYPE_NAMES`.
        error: The class of the error.

    Raises:
        AprError: It has another type, is not finite, or is a whole number of more than 64 bits.
    """
    if kind is int and _is_number(value) and abs(value) >= 2**63 and value != -(2**63):
        raise error(f"{name}={shorten(value)}, expected a whole number from -2**63 to 2**63 - 1")
    number = _is_number(value) and _is_finite(value)
    fits = isinstance(value, kind) and (number or kind not in (int, float))
    if not (fits or (kind is float and number)):
        raise error(f"{name}={shorten(value)}, expected {TYPE_NAMES[kind]}")
    return value  # type: ignore[no-any-return]


def number_types(kind: type) -> dict[str, type]:
    """Return the type of each field of a dataclass whose fields are numbers, or numbers and None."""
    return {f.name: float if str(f.type).startswith("float") else int for f in fields(kind)}


def check_numbers(instance: Any, name: str, error: type[AprError] = AprError) -> None:
    """Check the fields of a dataclass, all of which are numbers. A field may be None if its type says so.

    Args:
        instance: The dataclass.
        name: Precedes the names of its fields in messages.
        error: The class of the error.

    Raises:
        AprError: A field has another type.
    """
    kind_of_instance: Any = type(instance)
    for field, kind, may_be_none in _number_fields(kind_of_instance):
        value = getattr(instance, field)
        if value is not None or not may_be_none:
            check_type(f"{name} {field}", value, kind, error)


@cache
def _number_fields(kind: type) -> tuple[tuple[str, type, bool], ...]:
    """The name and type of each field of a dataclass of numbers, and whether it may be None."""
    types = number_types(kind)
    return tuple((f.name, types[f.name], "None" in str(f.type)) for f in fields(kind))


def unknown_name(name: Any, known: Iterable[str], what: str = "") -> str:
    """Return the message for a name that is not known: what it may mean, or all that is known.

    Examples:
        >>> unknown_name("budgett", ["budget", "mode"], "option ")
        "no option 'budgett', did you mean 'budget'?"
        >>> unknown_name("x", ["budget", "mode"], "option ")
        "no option 'x', expected some of budget, mode"

    Args:
        name: The name.
        known: The known names.
        what: Precedes the name.
    """
    known = list(known)
    expected = did_you_mean(name, known) or f"expected some of {', '.join(known)}"
    return f"no {what}{shorten(name)}, {expected}"


def check_types(values: Mapping[str, Any], types: Mapping[str, type], prefix: str) -> dict[str, Any]:
    """Return the values that are not null, each of the type that `types` has for its name.

    Args:
        values: Values by name.
        types: The types of the known names.
        prefix: Precedes the name of a value in messages.

    Raises:
        AprError: A name is unknown, or a value has the wrong type.
    """
    for name in values:
        if name not in types:
            raise AprError(unknown_name(name, types, prefix))
    return {name: check_type(prefix + name, v, types[name]) for name, v in drop_nulls(values).items()}


def check_sampling(values: Mapping[str, Any], vocab_size: int | None, prefix: str = "") -> dict[str, Any]:
    """Return the sampling parameters that are not null, as SGLang's tensors need them.

    Args:
        values: Sampling parameters by name, of `SAMPLING_TYPES`.
        vocab_size: Number of token ids that the model has. None if it is not known.
        prefix: Precedes the name of a parameter in messages.

    Raises:
        AprError: A name is unknown, or a value has the wrong type or is out of range.
    """
    sampling = check_types(values, SAMPLING_TYPES, prefix)
    for name, value in sampling.items():
        if name == "logit_bias":
            sampling[name] = _check_logit_bias(f"{prefix}{name}", value, vocab_size)
            continue
        in_range, expected = SAMPLING_RANGES[name]
        if not in_range(value):
            raise AprError(f"{prefix}{name}={shorten(value)}, expected {expected}")
        sampling[name] = SAMPLING_TYPES[name](value)  # a tensor of floats cannot hold every whole number
    return sampling


def shorten(value: Any) -> str:
    """Return the value as a message shows it, in at most 80 characters."""
    try:
        # `reprlib` does not go through all of a large or deep value.
        text = repr(value[:100]) if isinstance(value, str) else _SHORT.repr(value)
    except ValueError:  # a whole number of more digits than Python writes
        return "a whole number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_finite(number: float) -> bool:
    """Whether the number is finite as a float."""
    try:
        return math.isfinite(number)
    except OverflowError:  # a whole number above the largest float
        return False


def _check_logit_bias(name: str, bias: Mapping[Any, Any], vocab_size: int | None) -> dict[str, float]:
    """Return the bias by token id. SGLang wants the ids as strings."""
    vocab_size = MAX_VOCAB_SIZE if vocab_size is None else vocab_size
    checked: dict[str, float] = {}
    for key, value in bias.items():
        digits = str(key) if isinstance(key, str | int) and not isinstance(key, bool) else ""
        # `int` accepts more than ids: other alphabets' digits, signs, underscores. It refuses very long strings.
        is_id = digits.isascii() and digits.isdigit() and len(digits) <= 20 and int(digits) < vocab_size
        if not is_id:
            raise AprError(
                f"{name} has the key {shorten(key)}, expected a token id from 0 to {vocab_size - 1}"
            )
        number = check_type(f"{name}[{key!r}]", value, float)
        if abs(number) > MAX_LOGIT_BIAS:
            expected = f"a number from {-MAX_LOGIT_BIAS} to {MAX_LOGIT_BIAS}"
            raise AprError(f"{name}[{key!r}]={shorten(value)}, expected {expected}")
        checked[str(int(digits))] = float(number)
    return checked
