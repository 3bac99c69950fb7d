"""A served reward model as a verifier of `best_of_n`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from sgl_apr.engine.http_client import post_json_async
from sgl_apr.errors import EngineError


def concatenate(problem: Any, text: str) -> str:
    """A problem and a reply on consecutive lines."""
    return f"{problem}\n{text}"


@dataclass(frozen=True)
class RewardModel:
    """A server with a reward model: `sglang.launch_server --is-embedding`, or one with the same API.

    Attributes:
        url: The address of the server.
        route: "classify" scores one text; "v1/rerank", of cross encoders, gets the problem and the reply separately.
        show: Makes the one text of a problem and a reply, as the chat template of the reward model expects it.
        timeout: Seconds that a request may take.
        api_key: Sent as a bearer token.

    Examples:
        >>> await best_of_n(engine, "Why?", task=task, verifier=RewardModel("http://127.0.0.1:30001"))  # doctest: +SKIP
    """

    url: str
    route: Literal["classify", "v1/rerank"] = "classify"
    show: Callable[[Any, str], str] = concatenate
    timeout: float = 60.0
    api_key: str | None = None

    async def __call__(self, problem: Any, text: str) -> float:
        """The score of a reply.

        Raises:
            EngineTimeout: If the server takes longer than `timeout`.
            EngineError: If there is no answer, or not exactly one score in it.
        """
        if self.route == "classify":
            body: dict[str, Any] = {"text": self.show(problem, text)}
        else:
            body = {"query": str(problem), "documents": [text]}
        url = f"{self.url.rstrip('/')}/{self.route}"
        answer = await post_json_async(url, body, api_key=self.api_key, timeout=self.timeout)
        try:
            scores = (
                [float(one["score"]) for one in answer] if isinstance(answer, list) else answer["embedding"]
            )
            (score,) = scores
            return float(score)
        except (KeyError, TypeError, ValueError):
            raise EngineError(f"{url} answered {str(answer)[:200]!r}, expected one score") from None
