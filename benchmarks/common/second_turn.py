"""Measures how much of a conversation's first turn the second turn finds in the cache, as an ordinary client has it.

The client sends the reply back as text, and one more question.

    python -m benchmarks.common.second_turn http://127.0.0.1:30000 --json
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import aiohttp

import sgl_apr as apr

QUESTION = "Compare three ways to sort a list of numbers that is almost sorted already."
NEXT_QUESTION = "Which one would you take for a million numbers?"


@dataclass(frozen=True, slots=True)
class SecondTurn:
    """What the second turn of a conversation found in the cache.

    Attributes:
        context_tokens: Tokens of the first turn: its prompt, and what its reply left in the context of the model.
        prompt_tokens: Tokens of the prompt of the second turn.
        cached_tokens: How many of these were cached.
        forks: Forks of the first reply.
    """

    context_tokens: int
    prompt_tokens: int
    cached_tokens: int
    forks: int

    @property
    def share(self) -> float:
        """The part of the first turn's tokens that the second turn found in the cache."""
        return min(1.0, self.cached_tokens / self.context_tokens)


async def measure_second_turn(
    url: str,
    options: Mapping[str, Any] | None = None,
    *,
    request: Mapping[str, Any] | None = None,
    returns_reasoning: bool = False,
    question: str = QUESTION,
) -> SecondTurn:
    """Send two turns to a server.

    Args:
        url: The server.
        options: The object `apr` of both requests.
        request: Further fields of both requests.
        returns_reasoning: Send the `reasoning_content` of the reply back, too.
        question: The first message.
    """
    messages: list[dict[str, Any]] = [{"role": "user", "content": question}]
    async with aiohttp.ClientSession(raise_for_status=False) as session:
        first = await _complete(session, url, messages, {"trajectory": True, **(options or {})}, request)
        message = first["choices"][0]["message"]
        reply = {"role": "assistant", "content": message["content"]}
        if returns_reasoning:
            reply["reasoning_content"] = message["reasoning_content"]
        messages += [reply, {"role": "user", "content": NEXT_QUESTION}]
        second = await _complete(session, url, messages, dict(options or {}), request)
    trajectory = apr.Trajectory.from_dict(first["apr"]["trajectory"])
    usage = second["usage"]
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return SecondTurn(
        len(trajectory.context_ids), usage["prompt_tokens"], cached, len(first["apr"]["blocks"])
    )


def second_turn_cached(url: str, options: Mapping[str, Any] | None = None, **fields: Any) -> float:
    """Return the part of the first turn's tokens that the second turn found in the cache. See `measure_second_turn`."""
    return asyncio.run(measure_second_turn(url, options, **fields)).share


async def _complete(
    session: aiohttp.ClientSession,
    url: str,
    messages: list[dict[str, Any]],
    options: dict[str, Any],
    request: Mapping[str, Any] | None,
) -> dict[str, Any]:
    body = {"model": "default", "messages": messages, **(request or {}), "apr": options}
    async with session.post(f"{url}/v1/chat/completions", json=body) as response:
        answer: dict[str, Any] = await response.json()
        if response.status != 200:
            raise SystemExit(f"{url} answered {response.status}: {answer}")
    return answer


def main() -> None:
    """Measure a server for each kind of join."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("url")
    parser.add_argument("--options", type=json.loads, default={}, metavar="JSON", help="the object apr")
    parser.add_argument("--request", type=json.loads, default={}, metavar="JSON", help="further fields")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    rows = []
    for join in ("text", "kv"):
        for returns_reasoning in (False, True):
            measured = asyncio.run(
                measure_second_turn(
                    arguments.url,
                    {"join": join, **arguments.options},
                    request=arguments.request,
                    returns_reasoning=returns_reasoning,
                )
            )
            rows.append(
                {
                    "join": join,
                    "returns_reasoning": returns_reasoning,
                    **asdict(measured),
                    "share": round(measured.share, 4),
                }
            )
    if arguments.json:
        print(json.dumps({"rows": rows}))
        return
    for row in rows:
        print(", ".join(f"{name} {value}" for name, value in row.items()))


if __name__ == "__main__":
    main()
