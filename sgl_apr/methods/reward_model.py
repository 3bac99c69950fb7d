"""A served reward model as a verifier of `best_of_n`; it launches no server and knows no chat template."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import aiohttp

from sgl_apr.errors import EngineError, EngineTimeout


def concatenate(problem: Any, text: str) -> str:
    """A problem and a reply, one below the other."""
    return f"{problem}\n{text}"


@dataclass(frozen=True)
class RewardModel:
    """A server with a reward model, `sglang.launch_server --is-embedding` or one that answers alike.

    route: "classify" scores one text, which `show` makes of a problem and a reply, as the chat template of the reward
    model wants it; "v1/rerank", of cross encoders, gets the two apart. timeout: seconds that an answer may take.
    Calling it raises an `EngineError` if there is no answer or no score in it, `EngineTimeout` if it takes too long.

    >>> await best_of_n(engine, "Why?", task=task, verifier=RewardModel("http://127.0.0.1:30001"))  # doctest: +SKIP
    """

    url: str
    route: Literal["classify", "v1/rerank"] = "classify"
    show: Callable[[Any, str], str] = concatenate
    timeout: float = 60.0
    api_key: str | None = None

    async def __call__(self, problem: Any, text: str) -> float:
        """The score of a reply."""
        if self.route == "classify":
            asked: dict[str, Any] = {"text": self.show(problem, text)}
        else:
            asked = {"query": str(problem), "documents": [text]}
        said = await self._post(asked)
        try:
            scores = [float(one["score"]) for one in said] if isinstance(said, list) else said["embedding"]
            (score,) = scores
            return float(score)
        except (KeyError, TypeError, ValueError):
            raise EngineError(f"{self._at} says {str(said)[:200]!r}, expected one score") from None

    @property
    def _at(self) -> str:
        return f"{self.url.rstrip('/')}/{self.route}"

    async def _post(self, body: dict[str, Any]) -> Any:
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        limit = aiohttp.ClientTimeout(total=self.timeout)
        try:
            async with (
                aiohttp.ClientSession(headers=headers, timeout=limit) as session,
                session.post(self._at, json=body) as response,
            ):
                if response.status != 200:
                    said = " ".join((await response.text()).split())[:300]
                    raise EngineError(f"{self._at} answered {response.status}: {said}", response.status)
                return await response.json()
        except TimeoutError as error:
            raise EngineTimeout(f"{self._at} did not answer within {self.timeout:g} s") from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise EngineError(f"no answer of {self._at}: {error!r}") from error
