"""Checks the fields of a request to a route of another API against a table: which can be combined with `apr`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sgl_apr.errors import AprError, did_you_mean
from sgl_apr.runtime.value_checks import shorten


@dataclass(frozen=True, slots=True)
class FieldTable:
    """The fields of a route. Any other field is refused, so that none is ignored.

    Attributes:
        honoured: Fields that are honoured, or that change no reply, as the name of a user.
        only: Fields of which only some values can be had: those values, and why there are no others.
        refused: Fields that are refused, and why.
    """

    honoured: tuple[str, ...]
    only: Mapping[str, tuple[tuple[Any, ...], str]] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)

    def check(self, body: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> None:
        """Check that all fields of a request can be combined with `apr`.

        Args:
            body: The fields of the request. A null counts as absent.
            defaults: SGLang's defaults. A field that is refused may have this value, which asks for nothing.

        Raises:
            AprError: A field is refused, or unknown. The message names it.
        """
        for name, value in body.items():
            if (reason := self.refusal_reason(name, value, defaults or {})) is not None:
                raise AprError(reason)

    def refuses(self, body: Mapping[str, Any], defaults: Mapping[str, Any]) -> bool:
        """Return whether a field of a request cannot be combined with `apr`."""
        return any(self.refusal_reason(name, value, defaults) is not None for name, value in body.items())

    def refusal_reason(self, name: str, value: Any, defaults: Mapping[str, Any]) -> str | None:
        """Return why a field is refused, or None if it is not."""
        if value is None or name in self.honoured:
            return None
        if name in self.only:
            allowed, reason = self.only[name]
            if value in allowed:
                return None
            expected = " or ".join(map(repr, allowed))
            return f"{name}={shorten(value)} cannot be combined with apr, expected {expected}: {reason}"
        if name in self.refused:
            if not value or value == defaults.get(name):
                return None
            return f"{name} cannot be combined with apr: {self.refused[name]}"
        hint = did_you_mean(name, [*self.honoured, *self.only])
        return f"{shorten(name)} is no field of a request with apr" + (f", {hint}" if hint else "")
