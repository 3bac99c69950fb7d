"""Builds OpenAI's response objects of a turn of a session: its text, and the calls that wait or the end of the reply."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from sgl_apr.runtime.events import Event
from sgl_apr.server.api.openai.response import OpenAIResponseBuilder
from sgl_apr.server.api.openai.usage import usage
from sgl_apr.server.api.tools.client_calls import ClientCall
from sgl_apr.server.api.tools.session import CallsWaiting, ToolSession
from sgl_apr.trajectory.trajectory import Trajectory

TOOL_CALLS = "tool_calls"  # OpenAI's finish reason
TurnEvents = AsyncGenerator[Event | CallsWaiting | Trajectory, None]


async def turn_completion(
    response: OpenAIResponseBuilder, session: ToolSession, events: TurnEvents
) -> dict[str, Any]:
    """Return the complete response of a turn in one object."""
    reasoning, content = "", ""
    async with aclosing(events):
        async for event in events:
            match event:
                case CallsWaiting(calls):
                    message = {
                        "role": "assistant",
                        "content": content or None,
                        "reasoning_content": reasoning or None,
                    }
                    return response.single(
                        {"message": message | {TOOL_CALLS: [_call(call) for call in calls]}},
                        TOOL_CALLS,
                        turn_usage(session),
                        _summary(calls),
                    )
                case Trajectory():
                    delta = session.reply.finish(event)
                    completion = response.completion([event])
                    message = completion["choices"][0]["message"]
                    message["content"] = content + delta.content
                    message["reasoning_content"] = (reasoning + delta.reasoning) or None
                    return completion | {"usage": turn_usage(session, event)}
                case _:
                    delta = session.reply.add(event)
                    reasoning, content = reasoning + delta.reasoning, content + delta.content
    raise AssertionError("a turn ends with calls or with the trajectory")


async def turn_chunks(
    response: OpenAIResponseBuilder, session: ToolSession, events: TurnEvents
) -> AsyncGenerator[dict[str, Any], None]:
    """Yield the chunks of the streamed response of a turn."""
    choice = response.stream_choice(0, session.request, session.reply)
    trajectory: Trajectory | None = None
    async with aclosing(events):
        async for event in events:
            match event:
                case CallsWaiting(calls):
                    for chunk in choice.start():
                        yield chunk
                    for index, call in enumerate(calls):
                        yield response.chunk(0, {TOOL_CALLS: [{"index": index, **_call(call)}]})
                    yield response.chunk(0, {}, {"event": "waiting", **_summary(calls)}, TOOL_CALLS)
                case Trajectory():
                    trajectory = event
                    for chunk in choice.finish(event):
                        yield chunk
                case _:
                    for chunk in choice.add(event):
                        yield chunk
    if response.options.include_usage:
        yield response.usage_chunk(turn_usage(session, trajectory))


def turn_usage(session: ToolSession, trajectory: Trajectory | None = None) -> dict[str, Any]:
    """Return OpenAI's usage object of a turn.

    The tokens of earlier turns count as prompt, as they do with a server that does not keep trajectories. So
    `completion_tokens` of all turns add up to those of the reply.

    Args:
        session: The session.
        trajectory: The trajectory, if the turn has ended it.
    """
    prompt, earlier = session.turn_start, session.turn_start - len(session.request.prompt)
    cached = {"cached_tokens": min(session.turn_cached_tokens, prompt)}
    if trajectory is None:
        written = session.tokens - prompt
        counts: dict[str, Any] = {
            "completion_tokens": written,
            "completion_tokens_details": {"reasoning_tokens": written},
        }
    else:
        counts = usage([trajectory])
        written = max(0, counts["completion_tokens"] - earlier)
        reasoning = max(0, counts["completion_tokens_details"]["reasoning_tokens"] - earlier)
        counts |= {"completion_tokens": written, "completion_tokens_details": {"reasoning_tokens": reasoning}}
    totals = {"prompt_tokens": prompt, "total_tokens": prompt + written, "prompt_tokens_details": cached}
    return counts | totals


def _call(call: ClientCall) -> dict[str, Any]:
    function = {"name": call.request.name, "arguments": call.request.arguments}
    return {"id": call.id, "type": "function", "function": function}


def _summary(calls: tuple[ClientCall, ...]) -> dict[str, Any]:
    """Return the field `apr` of a response with calls: which sequence made which."""
    made = [{"id": call.id, "path": call.request.path, "call": call.request.id} for call in calls]
    return {"finish": TOOL_CALLS, "calls": made}
