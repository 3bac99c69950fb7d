"""How good a branch is while it is written, by a scorer that may be hostile."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from inspect import isawaitable
from math import isfinite
from typing import Any, Literal

from sgl_apr.errors import AprError
from sgl_apr.runtime.value_checks import shorten
from sgl_apr.trajectory.calls import TopLogprobs
from sgl_apr.trajectory.confidence import token_confidences, trace_confidence

Scorer = Callable[[Any, str], float | Awaitable[float]]
TOP_LOGPROBS = 20  # that a request has for the confidence


@dataclass(frozen=True)
class BranchScoring:
    """A scorer that judges branches at the borders of their thoughts, and ends the weak ones (after Gambit, arXiv 2608.08020).

    At each border a tournament is held: as soon as all branches that still run have reached the border, the worse ones end. What
    they have not written of their tokens is for the others. A score that fails, is late, or is no number ends nothing.

    Attributes:
        scorer: A function of the problem and what a branch has so far, such as `RewardModel`: higher is better. "confidence" takes
            how sure the model is of its tokens (`trace_confidence`), and asks nobody.
        border: The text that ends a thought.
        keep: Share of the running branches that stay at each border.
        threshold: End branches below this score instead, without a tournament.
        timeout: Seconds that a score may take.

    Raises:
        AprError: A value is not possible.
    """

    scorer: Scorer | Literal["confidence"] = "confidence"
    border: str = "\n"
    keep: float = 0.5
    threshold: float | None = None
    timeout: float = 10.0

    def __post_init__(self) -> None:
        if self.scorer != "confidence" and not callable(self.scorer):
            raise AprError(
                f'scorer={shorten(self.scorer)}, expected a function of the problem and a text, or "confidence"'
            )
        if not isinstance(self.border, str) or not self.border:
            raise AprError(f"border={shorten(self.border)}, expected the text that ends a thought")
        for name in ("keep", "threshold", "timeout"):
            value = getattr(self, name)
            if (value is not None or name != "threshold") and not _is_number(value):
                raise AprError(f"{name}={shorten(value)}, expected a number")
        if not 0 < self.keep <= 1:
            raise AprError(f"keep={self.keep}, expected a share above 0, and 1 at most")
        if not self.timeout > 0:
            raise AprError(f"timeout={self.timeout}, expected more than 0 seconds")

    @property
    def request_options(self) -> dict[str, Any]:
        """What requests need for it."""
        return {"logprobs": True, "top_logprobs": TOP_LOGPROBS} if self.scorer == "confidence" else {}

    async def score(self, problem: Any, text: str, top_logprobs: Sequence[TopLogprobs]) -> float | None:
        """The score of a text; None if the scorer failed, is late, or returned no number."""
        if not callable(self.scorer):
            return trace_confidence(token_confidences(top_logprobs), "mean")
        try:
            async with asyncio.timeout(self.timeout):
                found = await asyncio.to_thread(self.scorer, problem, text)
                value = float(await found if isawaitable(found) else found)
        except Exception:  # a scorer that fails costs no answer
            return None
        return value if isfinite(value) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
