"""What `reasoning_effort` of OpenAI's API means for a trajectory: one table of budgets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sgl_apr.errors import AprError
from sgl_apr.runtime.value_checks import shorten
from sgl_apr.server.api.limits import RequestLimits

# Options by effort. What a request sets in `apr` or as `max_tokens` wins, and the operator's limits bound them.
EFFORTS: Mapping[str, Mapping[str, Any]] = {
    "none": {"mode": "sequential", "min_blocks": 0},
    "minimal": {"mode": "sequential", "min_blocks": 0},
    "low": {"budget": {"tokens": 2048, "width": 2, "blocks": 1}},
    "medium": {},
    "high": {"budget": {"tokens": 16384}},
    "xhigh": {"budget": {"tokens": 32768}},
    "max": {"budget": {"tokens": 32768}},
}


def effort_options(effort: Any, limits: RequestLimits) -> dict[str, Any]:
    """Return the options of a reasoning effort.

    Args:
        effort: The value of the field. None has no options.
        limits: The operator's limits, which bound them.

    Raises:
        AprError: It is none of `EFFORTS`.
    """
    if effort is None:
        return {}
    if not isinstance(effort, str) or effort not in EFFORTS:
        raise AprError(f"reasoning_effort={shorten(effort)}, expected one of {', '.join(EFFORTS)}")
    options = dict(EFFORTS[effort])
    if "budget" in options:
        bounds = {"tokens": limits.tokens, "width": limits.width}
        options["budget"] = {
            name: value if (bound := bounds.get(name)) is None else min(value, bound)
            for name, value in options["budget"].items()
        }
    return options
