"""Runs methods inside the server process, and answers chat completions that ask for one."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import Request, Response

from sgl_apr.engine.in_process import InProcessEngine
from sgl_apr.errors import BudgetExceeded
from sgl_apr.methods.chat_tasks import chat_task
from sgl_apr.methods.registry import MethodResult, method
from sgl_apr.methods.task import SampledTask
from sgl_apr.runtime.event_queue import stream_events
from sgl_apr.runtime.events import Event, OnEvent
from sgl_apr.server.api.http_errors import json_response
from sgl_apr.server.api.http_streams import event_stream, run_until_disconnect
from sgl_apr.server.api.method.conversation import read_conversation
from sgl_apr.server.api.method.request import MethodRequest
from sgl_apr.server.api.method.response import MethodResponse
from sgl_apr.server.api.options import OptionsParser
from sgl_apr.server.api.service import TrajectoryService, hold_first


@dataclass(frozen=True, slots=True)
class PreparedMethod:
    """A method that can run.

    Attributes:
        engine: The engine.
        request: What was asked for.
        problem: The last message of the conversation.
        task: The task, whose prompts are turns of the conversation.
        prompt_tokens: Tokens of the prompt of one reply.
    """

    engine: InProcessEngine
    request: MethodRequest
    problem: str
    task: SampledTask[str]
    prompt_tokens: int


async def prepare_method(service: TrajectoryService, request: MethodRequest) -> PreparedMethod:
    """Read the conversation of a request.

    Raises:
        AprError: The request is not valid.
        BudgetExceeded: The conversation is longer than the context of the model.
    """
    parser, engine = await service.parser(), await service.engine()
    problem, conversation = read_conversation(request.messages, engine.render_chat)
    task = chat_task(request.task, engine, conversation)
    _check_size(sum(map(len, (conversation.before, problem))), "characters", parser, parser.max_token_chars)
    tokens = len(task.prompt(problem).encode(engine.tokenizer))
    _check_size(tokens, "tokens", parser, 1)
    return PreparedMethod(engine, request, problem, task, tokens)


async def run_method(
    service: TrajectoryService, prepared: PreparedMethod, on_event: OnEvent | None = None
) -> MethodResult:
    """Run a method to its end. It may wait until other trajectories have ended. Cancelling the call cancels it.

    Raises:
        ServerBusy: As many trajectories run and wait as the operator allows, or no slot became free in time.
        Inapplicable: The task cannot express the method.
        EngineError: The engine failed.
    """
    request = prepared.request
    async with service.admit(prepared.prompt_tokens, request.budget.tokens) as slot:
        result = await method(request.name)(
            prepared.engine, prepared.problem, task=prepared.task, on_event=on_event, **request.options
        )
        slot.trajectory = result.trajectory
    service.counters.count_trajectory(result.trajectory, None)
    return result


async def method_completion(
    service: TrajectoryService, raw_request: Request, request: MethodRequest, response: MethodResponse
) -> Response:
    """Answer a chat completion by a method.

    Args:
        service: Runs the method.
        raw_request: The HTTP request.
        request: What it asks for.
        response: Builds the response.
    """
    receive = raw_request.receive
    prepared = await run_until_disconnect(receive, prepare_method(service, request))
    if request.stream:
        return await event_stream(receive, response.chunks(_stream(service, prepared)))
    result = await run_until_disconnect(receive, run_method(service, prepared))
    return json_response(response.completion(result))


async def _stream(
    service: TrajectoryService, prepared: PreparedMethod
) -> AsyncGenerator[Event | MethodResult, None]:
    """Yield the events of a method as they happen, then its result. Closing the stream cancels the method."""
    events = hold_first(stream_events(lambda on_event: run_method(service, prepared, on_event)))
    async with aclosing(events):
        async for event in events:
            yield event


def _check_size(length: int, unit: str, parser: OptionsParser, factor: int) -> None:
    """Raise `BudgetExceeded` for a conversation that is longer than the context of the model."""
    limit = parser.context_length * factor
    if length >= limit:
        raise BudgetExceeded(
            f"the conversation has {length} {unit}, expected fewer than {limit}: the context of the model, which has "
            f"{parser.context_length} tokens"
        )


def is_method_request(apr: Any) -> bool:
    """Whether the field `apr` of a request asks for a method."""
    return isinstance(apr, dict) and apr.get("method") is not None
