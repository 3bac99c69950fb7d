"""Finds the trajectory that a chat request continues with results of tools, or opens a session for a new one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fastapi import Request

from sgl_apr.server.api.openai.reply_stream import ReplyStream
from sgl_apr.server.api.openai.request import OpenAIRequest
from sgl_apr.server.api.service import TrajectoryService
from sgl_apr.server.api.tools.client_calls import ClientCalls
from sgl_apr.server.api.tools.messages import parse_messages
from sgl_apr.server.api.tools.response import TurnEvents
from sgl_apr.server.api.tools.session import ToolSession
from sgl_apr.server.api.tools.sessions import owner_of


async def find_turn(
    service: TrajectoryService, raw_request: Request, body: Mapping[str, Any], parsed: OpenAIRequest
) -> tuple[ToolSession, TurnEvents] | None:
    """Return the session of a chat request, and what happens in it until the response ends.

    Args:
        service: Has the sessions.
        raw_request: The HTTP request. Its key says whose session it is.
        body: Its fields.
        parsed: The same, parsed.

    Returns:
        None if the client runs no tools.

    Raises:
        AprError: The request brings results that do not fit to the calls that wait, or is not valid.
    """
    sessions = service.sessions
    messages, owner = parse_messages(body.get("messages")), owner_of(raw_request.headers.get("authorization"))
    if (found := sessions.find(messages, owner)) is not None:
        session, results = found
        session.request = replace(session.request, turn=parsed.request.turn)  # the reply answers this request
        return session, sessions.turn(session, messages, results)
    if not parsed.runs_tools:
        return None
    sessions.check_allowed()
    calls = ClientCalls()
    options = {**parsed.request.request_options, "run_tool": calls.run_tool}
    checked = await service.check(replace(parsed.request, request_options=options))
    response = parsed.response
    reply = ReplyStream(checked.options, separate_reasoning=response.separate_reasoning, stop=response.stop)
    session = service.open_session(calls, checked, messages, reply, owner)
    return session, sessions.turn(session)
