"""Runs forks of a context inside the server process, and handles their route."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import Request, Response

from sgl_apr.errors import BudgetExceeded
from sgl_apr.methods.context_fork import PreparedFork, check_fork, prepare_fork, run_prepared_fork
from sgl_apr.methods.fork_result import ForkResult
from sgl_apr.runtime.event_json import event_to_json
from sgl_apr.runtime.event_queue import stream_events
from sgl_apr.runtime.events import Event, OnEvent
from sgl_apr.runtime.prompts import is_chat
from sgl_apr.server.api.config import merge_options
from sgl_apr.server.api.fork.request import FORK_REQUEST_OPTIONS, ForkRequest
from sgl_apr.server.api.http_errors import json_response, respond_to_errors
from sgl_apr.server.api.http_streams import event_stream, run_until_disconnect
from sgl_apr.server.api.options import LONG_PROMPT, OptionsParser
from sgl_apr.server.api.service import TrajectoryService, hold_first

FORK_RESULT_EVENT = "fork_result"  # the last event of a stream, with the fields of the response


@dataclass(frozen=True, slots=True)
class CheckedFork:
    """A fork whose arguments are checked, and whose prompts are encoded.

    Attributes:
        prepared: The fork.
        request: What was asked for.
    """

    prepared: PreparedFork
    request: ForkRequest


async def check_request(service: TrajectoryService, request: ForkRequest) -> CheckedFork:
    """Check a request, and encode its prompts.

    Raises:
        AprError: The request is not valid.
    """
    parser, engine = await service.parser(), await service.engine()
    defaults = {n: v for n, v in service.config.default_options.items() if n in FORK_REQUEST_OPTIONS}
    request = request.with_options(merge_options(defaults, request.options), service.config.limits)
    check_text_size(request, parser)
    prompt = request.prompt
    if not is_chat(prompt):
        is_long = isinstance(prompt, str | list) and len(prompt) > LONG_PROMPT
        prompt = list(
            await asyncio.to_thread(parser.prompt_ids, prompt) if is_long else parser.prompt_ids(prompt)
        )
    options = {name: value for name, value in request.options.items() if name != "budget"}
    tasks, merge = check_fork(engine, prompt, request.tasks, request.merge, request.policy, None, options)

    def prepare() -> Coroutine[Any, Any, PreparedFork]:
        return prepare_fork(engine, prompt, tasks, merge, request.tools)

    if is_chat(prompt) and _count_chars(prompt) > LONG_PROMPT:  # other requests do not wait for it
        return CheckedFork(await asyncio.to_thread(lambda: asyncio.run(prepare())), request)
    return CheckedFork(await prepare(), request)


def check_text_size(request: ForkRequest, parser: OptionsParser) -> None:
    """Check the length of the texts of a request before anything encodes them.

    Raises:
        BudgetExceeded: A conversation, a task or the merge is longer than the context of the model.
    """
    limit = parser.context_length * parser.max_token_chars
    prompts = [("the messages", request.prompt)] if is_chat(request.prompt) else []
    prompts += [(f"task {task.name}", task.prompt) for task in request.tasks]
    prompts += [("merge", request.merge.prompt)] if request.merge else []
    for name, prompt in prompts:
        if (length := _count_chars(prompt)) > limit:
            raise BudgetExceeded(
                f"{name}: the text has {length} characters, expected at most {limit}: the context of the model, "
                f"which has {parser.context_length} tokens"
            )


async def run_fork(
    service: TrajectoryService, checked: CheckedFork, on_event: OnEvent | None = None
) -> ForkResult:
    """Run a fork to its end. It may wait until others have ended. Cancelling the call cancels the fork.

    Raises:
        ServerBusy: As many trajectories run and wait as the operator allows, or no slot became free in time.
        AprError: The budget or the context has no room for it.
        EngineError: The engine failed.
    """
    prepared, request = checked.prepared, checked.request
    budget = request.options["budget"]
    async with service.admit(prepared.prompt_tokens, budget.tokens) as slot:
        result = await run_prepared_fork(prepared, request.policy, on_event=on_event, **request.options)
        slot.trajectory = result.trajectory
    service.counters.count_trajectory(result.trajectory, prepared.merge.join if prepared.merge else None)
    return result


@respond_to_errors
async def fork(request: Request) -> Response:
    """Answer several tasks at once after one context, and merge what they return.

    The context is `prompt` (text), `input_ids`, or `messages`. The response is that of `ForkResult.to_dict`, or with
    `"stream": true` the events of all branches (`sgl_apr.runtime.event_from_json`) and then one `fork_result`.
    """
    service: TrajectoryService = request.app.state.apr
    fork_request = ForkRequest.from_json(await request.body(), service.operator_tools.tools)
    checked = await run_until_disconnect(request.receive, check_request(service, fork_request))
    if fork_request.stream:
        events = hold_first(stream_events(lambda on_event: run_fork(service, checked, on_event)))
        return await event_stream(request.receive, _event_objects(events))
    result = await run_until_disconnect(request.receive, run_fork(service, checked))
    return json_response(result.to_dict())


async def _event_objects(
    events: AsyncGenerator[Event | ForkResult, None],
) -> AsyncGenerator[dict[str, Any], None]:
    async with aclosing(events):
        async for event in events:
            if isinstance(event, ForkResult):
                result = event.to_dict()
                del result["trajectory"]  # the events are the trajectory
                yield {"event": FORK_RESULT_EVENT, **result}
            else:
                yield event_to_json(event)


def _count_chars(prompt: Any) -> int:
    """Characters of a text or of all texts of messages."""
    if isinstance(prompt, str):
        return len(prompt)
    if isinstance(prompt, dict):
        return sum(_count_chars(value) for value in prompt.values())
    return sum(_count_chars(part) for part in prompt) if isinstance(prompt, list | tuple) else 0
