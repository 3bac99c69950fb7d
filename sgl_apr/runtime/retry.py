"""Which failed requests are repeated, and after how long."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

import tenacity

from sgl_apr.errors import AprError, EngineError, EngineTimeout
from sgl_apr.runtime.value_checks import check_numbers

T = TypeVar("T")
log = logging.getLogger(__name__)
RETRYABLE_STATUSES = frozenset({429, 500, 502, 503, 504})


def is_retryable(error: BaseException) -> bool:
    """Whether the same request may succeed later: the server broke off, was busy, or did not listen.

    A timeout is not repeated, since it has used its whole time already. Requests have no side effects, so all are
    safe to repeat.
    """
    if isinstance(error, EngineTimeout) or not isinstance(error, EngineError):
        return False
    return error.status is None or error.status in RETRYABLE_STATUSES


@dataclass(frozen=True, slots=True)
class Retry:
    """Repeat a failed request, after a random time that doubles with each attempt.

    Attributes:
        attempts: How often a request is sent, at most.
        wait: Upper bound of the first wait, in seconds.
        max_wait: Upper bound of every wait, in seconds.
    """

    attempts: int = 3
    wait: float = 0.1
    max_wait: float = 10.0

    def __post_init__(self) -> None:
        check_numbers(self, "retry")
        if self.attempts < 1 or not 0 <= self.wait <= self.max_wait:
            raise AprError(f"{self}: expected attempts >= 1 and 0 <= wait <= max_wait")

    async def __call__(self, attempt: Callable[[], Awaitable[T]], allowed: Callable[[], bool]) -> T:
        """What `attempt` returns, or the error of the last attempt.

        Args:
            attempt: Sends the request.
            allowed: Whether another attempt may be made.
        """
        try:
            return await attempt()
        except EngineError as error:
            failed: list[EngineError] = [error]

        async def next_attempt() -> T:
            if failed:
                raise failed.pop()
            return await attempt()

        # Only after a failure, since this set-up takes longer than the rest of the loop's work for a request.
        tries = tenacity.AsyncRetrying(
            stop=lambda state: state.attempt_number >= self.attempts or not allowed(),
            wait=tenacity.wait_random_exponential(self.wait, self.max_wait),
            retry=tenacity.retry_if_exception(is_retryable),
            before_sleep=lambda state: log.info("attempt %d: %s", state.attempt_number, _error(state)),
            reraise=True,
        )
        return await tries(next_attempt)


def as_engine_error(error: OSError) -> EngineError:
    """Return the error of an engine that raised what its connection raised."""
    text = str(error) or type(error).__name__
    return (EngineTimeout if isinstance(error, TimeoutError) else EngineError)(f"the engine failed: {text}")


def _error(state: tenacity.RetryCallState) -> BaseException | None:
    return state.outcome.exception() if state.outcome else None
