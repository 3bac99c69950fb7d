"""Checks the types and the values of JSON options.

SGLang's scheduler, and the server with it, ends with some values that SGLang does not refuse itself. So every value is
checked before a request is sent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from sgl_apr.errors import AprError

T = TypeVar("T")
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


def check_type(name: str, value: Any, kind: type[T]) -> T:
    """Return the value if it has this type. A whole number is also a float, but a bool is never a number.

    Raises:
        AprError: It has another type, is not finite, or is a whole number of more than 64 bits.
    """
    if kind is int and _is_number(value) and abs(value) >= 2**63 and value != -(2**63):
        raise AprError(f"{name}={shorten(value)}, expected a whole number from -2**63 to 2**63 - 1")
    number = _is_number(value) and _is_finite(value)
    fits = isinstance(value, kind) and (number or kind not in (int, float))
    if not (fits or (kind is float and number)):
        raise AprError(f"{name}={shorten(value)}, expected {TYPE_NAMES[kind]}")
    return value  # type: ignore[no-any-return]


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
            raise AprError(f"no {prefix}{shorten(name)}, expected some of {', '.join(types)}")
    return {name: check_type(prefix + name, v, types[name]) for name, v in drop_nulls(values).items()}


def check_sampling(values: Mapping[str, Any], vocab_size: int, prefix: str = "") -> dict[str, Any]:
    """Return the sampling parameters that are not null, as SGLang's tensors need them.

    Args:
        values: Sampling parameters by name, of `SAMPLING_TYPES`.
        vocab_size: Number of token ids that the model has.
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
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_finite(number: float) -> bool:
    """Whether the number is finite as a float."""
    try:
        return math.isfinite(number)
    except OverflowError:  # a whole number above the largest float
        return False


def _check_logit_bias(name: str, bias: Mapping[Any, Any], vocab_size: int) -> dict[str, float]:
    """Return the bias by token id. SGLang wants the ids as strings."""
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
