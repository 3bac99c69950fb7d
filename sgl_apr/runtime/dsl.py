"""`apr.reason`: the expression for `@sgl.function` programs; the backend that runs it is `apr.Endpoint`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sgl_apr.budget import Budget
from sgl_apr.dialects import Dialect
from sgl_apr.runtime.plan import Mode, Plan, plan
from sgl_apr.tokenizer import Tokenizer

if TYPE_CHECKING:
    from sglang.lang.ir import SglGen


@dataclass(frozen=True)
class Reason:
    """What an `apr.reason` expression asks for. It travels in `dtype`, which any other backend refuses."""

    name: str
    dialect: Dialect | str | None
    options: Mapping[str, Any]
    sampling: Mapping[str, Any] = field(default_factory=dict)

    def plan(self, tokenizer: Tokenizer, sampling: Mapping[str, Any]) -> Plan:
        """The plan for a model with this tokenizer, under these sampling parameters."""
        return plan(self.dialect, tokenizer, sampling=dict(sampling), **self.options)

    def __str__(self) -> str:
        return f"apr.reason({self.name!r}), which needs the backend apr.Endpoint"

    __repr__ = __str__


def reason(
    name: str,
    dialect: Dialect | str | None = None,
    *,
    budget: Budget | None = None,
    join: str | None = None,
    mode: Mode = "auto",
    min_blocks: int = 0,
    max_blocks: int | None = None,
    min_width: int | None = None,
    policy: str | None = None,
    wrap: Callable[[str], str] | None = None,
    constrain: bool = True,
    plain: bool = False,
    **sampling: Any,
) -> SglGen:
    """Let the model think, forking and joining as it decides; `state[name]` is its answer.

    Without a `dialect` it is the one whose tags the model's tokenizer has, else "threadweaver". The answer is the text after the last join; `state.text()` holds the whole trace, and
    `state.get_meta_info(name)["trajectory"]` the `Trajectory`. `sampling` takes SGLang's sampling
    parameters (temperature, top_p, ...) over those of the program. The other options are those of
    `Plan`, and are checked here: what the dialect does not allow raises at once.

    >>> s += sgl.assistant(apr.reason("answer", dialect="threadweaver", budget=apr.Budget(width=4)))  # doctest: +SKIP
    """
    from sglang.lang.ir import SglGen

    options: dict[str, Any] = {
        "budget": budget or Budget(),
        "join": join,
        "mode": mode,
        "min_blocks": min_blocks,
        "max_blocks": max_blocks,
        "min_width": min_width,
        "policy": policy,
        "wrap": wrap,
        "constrain": constrain,
        "plain": plain,
    }
    if dialect is not None:
        plan(dialect, **options)
    return SglGen(name, dtype=Reason(name, dialect, options, dict(sampling)))
