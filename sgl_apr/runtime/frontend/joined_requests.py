"""Requests that continue what a program has joined in the KV cache, also when the cache has lost parts of it."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from sgl_apr.engine.base import Request
from sgl_apr.engine.http import HttpEngine
from sgl_apr.engine.routing import ROUTING_KEY_FIELD
from sgl_apr.engine.sglang_names import CACHE_MISS_STATUS
from sgl_apr.engine.sglang_request import with_layout
from sgl_apr.errors import EngineError
from sgl_apr.runtime.frontend.program_requests import new_rid
from sgl_apr.runtime.frontend.token_ledger import ProgramTokens
from sgl_apr.trajectory.join_layout import Layout, commit_prompts

T = TypeVar("T")
log = logging.getLogger(__name__)


async def send_joined(
    http: HttpEngine, tokens: ProgramTokens, routing_key: str, send: Callable[[Layout | None], Awaitable[T]]
) -> T:
    """Send a request whose prompt is the tokens of a program, with the layout of what is joined in them.

    Lost parts are committed again, once. If that does not help, the prompt is read as text.

    Args:
        http: The connection to the server.
        tokens: The prompt.
        routing_key: The routing key of the program.
        send: Sends the request with a layout, or as text.
    """
    layout = tokens.joined_layout
    if layout is None:
        return await send(None)
    fields = {ROUTING_KEY_FIELD: routing_key}
    for attempt in range(2):
        try:
            if attempt:
                for ranges, branch_layout in commit_prompts(layout):
                    ids = tuple(i for start, end in ranges for i in tokens.ids[start:end])
                    await http.commit(Request(new_rid(), ids, layout=branch_layout, fields=fields))
            return await send(layout)
        except EngineError as error:
            if error.status != CACHE_MISS_STATUS:
                raise
            log.info("the cache has lost parts of a program: %s", error)
    return await send(None)


def body_with_layout(body: dict[str, Any], layout: Layout | None) -> dict[str, Any]:
    """Return the body of a request with a layout, and with a request id under which nothing was sent yet."""
    if layout is None:
        return body
    return body | {"rid": new_rid(), "sampling_params": with_layout(body["sampling_params"], layout)}


def continues_joins(body: dict[str, Any]) -> bool:
    """Whether a request of a program can continue what is joined in the cache: one that decodes one sequence."""
    return "rid" in body and not body.get(
        "return_logprob"
    )  # SGLang computes the log-probabilities of prompts anew
