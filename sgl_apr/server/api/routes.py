"""The routes that this package adds to SGLang's server, and `apr` in the bodies of OpenAI's; translation only.

POST /v1/chat/completions, /v1/completions   with an object `apr` in the body; without, they are SGLang's alone
POST /apr/generate                           a prompt in, a trajectory (or its events) out
GET  /apr/dialects                           what a trajectory may be written in
GET  /apr/stats                              what has run so far
GET  /apr/ui                                 a page to ask in, and to watch what is written; it needs no key to be opened
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import asdict
from typing import Any

import orjson
from fastapi import APIRouter, FastAPI, Request, Response

from sgl_apr.errors import AprError, LaunchError
from sgl_apr.formats.dialects import dialect, dialect_names
from sgl_apr.formats.presets import dialect_for
from sgl_apr.runtime.event_json import event_to_json
from sgl_apr.runtime.options import DEFAULT_DIALECT, ReasonOptions
from sgl_apr.server.api.http import (
    HTTP_CLIENT_CLOSED_REQUEST,
    as_error,
    as_json,
    event_stream,
    run_until_disconnect,
)
from sgl_apr.server.api.limits import RequestLimits
from sgl_apr.server.api.openai_request import parse_openai_request
from sgl_apr.server.api.openai_response import OpenAIResponseBuilder
from sgl_apr.server.api.options import check_type, drop_nulls
from sgl_apr.server.api.service import TrajectoryService
from sgl_apr.server.hooks import require_sglang
from sgl_apr.trajectory.trajectory import Trajectory
from sgl_apr.views.page import render_live_page

UI = "/apr/ui"
HANDLE = "sglang.srt.entrypoints.openai.serving_base:OpenAIServingBase.handle_request"
AUTH = "sglang.srt.utils.auth:decide_request_auth"
FACTS = (
    "width",
    "min_width",
    "max_width",
    "max_depth",
    "first_number",
    "branch_context",
    "joins",
    "published_join",
    "policy",
)


def install(caps: RequestLimits) -> None:
    """Add all of it to the server that this process is going to launch; raises `LaunchError`."""
    server = "sglang.srt.entrypoints.http_server"
    app, state = require_sglang(f"{server}:app"), require_sglang(f"{server}:get_global_state")
    chat = require_sglang("sglang.srt.entrypoints.openai.serving_chat:OpenAIServingChat")
    completion = require_sglang("sglang.srt.entrypoints.openai.serving_completions:OpenAIServingCompletion")
    for serving in (chat, completion):
        require_sglang(
            f"{serving.__module__}:{serving.__name__}._convert_to_internal_request",
            ["request", "raw_request"],
        )
        require_sglang(f"{serving.__module__}:{serving.__name__}._validate_request")

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.apr = TrajectoryService(state().tokenizer_manager, caps)
        yield

    async def handle(original: Any, serving: Any, request: Any, raw_request: Any) -> Any:
        if raw_request is None or not isinstance(serving, chat | completion):
            return await original(serving, request, raw_request)
        options = (await raw_request.json()).get("apr")  # parsed once already, and kept
        if options is None:
            return await original(serving, request, raw_request)
        return await _openai(serving, request, raw_request, options, isinstance(serving, chat))

    hooks = require_sglang("sglang.srt.plugins.hook_registry:HookRegistry")
    around = require_sglang("sglang.srt.plugins.hook_registry:HookType.AROUND")
    stock = require_sglang(HANDLE, ["request", "raw_request"])
    wall = require_sglang(AUTH, ["method", "path"])
    hooks.register(HANDLE.replace(":", "."), handle, around)
    hooks.register(AUTH.replace(":", "."), allow_ui_without_key, around)
    hooks.apply_hooks()
    for path, before in ((HANDLE, stock), (AUTH, wall)):
        if require_sglang(path) is before:  # SGLang only logs what goes wrong there
            raise LaunchError(f"{path} could not be wrapped")
    app.include_router(_router(lifespan))


def allow_ui_without_key(decide: Callable[..., Any], **request: Any) -> Any:
    """SGLang's decision whether a request may pass, but for the page of `/apr/ui`: a browser cannot send the key
    before there is a field for it. The page holds nothing, and all that it asks for takes the key."""
    if request["method"] == "GET" and request["path"] == UI:
        return require_sglang("sglang.srt.utils.auth:AuthDecision")(allowed=True)
    return decide(**request)


def _router(lifespan: Callable[[FastAPI], Any]) -> APIRouter:
    router = APIRouter(lifespan=lifespan)
    router.add_api_route("/apr/generate", generate, methods=["POST"])
    router.add_api_route("/apr/dialects", dialects, methods=["GET"])
    router.add_api_route("/apr/stats", stats, methods=["GET"])
    router.add_api_route(UI, ui, methods=["GET"])
    return router


def _answered(route: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    """The same route, with errors as answers."""

    async def answer(request: Request) -> Response:
        try:
            return await route(request)
        except Exception as error:
            return as_error(error)

    answer.__doc__ = route.__doc__
    return answer


async def _openai(serving: Any, request: Any, raw_request: Request, options: Any, chat: bool) -> Response:
    """The answer to a request with `apr`."""
    service: TrajectoryService = raw_request.app.state.apr
    try:
        parser = await service.parser()
        asked = await parse_openai_request(parser, serving, request, raw_request, options, chat=chat)
        builder = OpenAIResponseBuilder(request.model, chat, asked.options_)
        if request.stream:
            heard = service.stream(asked.prompt, asked.plan)
            return await event_stream(raw_request.receive, builder.chunks(heard))
        return await _run_to_completion(raw_request, asked.prompt, asked.plan, builder.answer)
    except Exception as error:
        return as_error(error)


async def _run_to_completion(
    request: Request, prompt: tuple[int, ...], plan: ReasonOptions, answer: Callable[[Trajectory], Any]
) -> Response:
    """Run a trajectory for a client that waits for all of it."""
    service: TrajectoryService = request.app.state.apr
    trajectory = await run_until_disconnect(request.receive, service.run(prompt, plan))
    return (
        Response(status_code=HTTP_CLIENT_CLOSED_REQUEST)
        if trajectory is None
        else as_json(answer(trajectory))
    )


@_answered
async def generate(request: Request) -> Response:
    """A trajectory of `prompt` (text) or `input_ids`, with the options of `apr` beside them.

    Its JSON (`apr.Trajectory.from_json`), or with `"stream": true` its events (`sgl_apr.runtime.event_json`).
    """
    service: TrajectoryService = request.app.state.apr
    try:
        body = orjson.loads(
            await request.body()
        )  # unlike the standard library, neither NaN nor half a character
    except ValueError as error:
        raise AprError(f"the body is no JSON: {error}") from None
    options = drop_nulls(check_type("the body", body, dict))
    streamed = check_type("stream", options.pop("stream", False), bool)
    prompt, ids = options.pop("prompt", None), options.pop("input_ids", None)
    parser = await service.parser()
    if prompt is not None and ids is not None:
        raise AprError("expected prompt or input_ids, not both")
    found = parser.prompt(ids if prompt is None else prompt)
    plan = parser.plan(options, len(found))
    if streamed:
        return await event_stream(request.receive, _events(service, found, plan))
    return await _run_to_completion(
        request, found, plan, lambda trajectory: orjson.Fragment(trajectory.to_json())
    )


async def _events(
    service: TrajectoryService, prompt: tuple[int, ...], plan: ReasonOptions
) -> AsyncGenerator[dict[str, Any], None]:
    async with aclosing(service.stream(prompt, plan)) as heard:
        async for item in heard:
            if not isinstance(item, Trajectory):
                yield event_to_json(item)


@_answered
async def dialects(request: Request) -> Response:
    """Every dialect with its tags and facts, and the one that is taken where none is named."""
    service: TrajectoryService = request.app.state.apr
    usual = dialect_for((await service.engine()).tokenizer)
    known = [dialect(name) for name in dialect_names()]
    return as_json(
        {
            "default": usual.name if usual else DEFAULT_DIALECT,
            "dialects": [
                {"name": d.name, "tags": d.tags, **{fact: getattr(d, fact) for fact in FACTS}} for d in known
            ],
        }
    )


@_answered
async def stats(request: Request) -> Response:
    """Counts since the launch, the caps, and what the engine can do."""
    service: TrajectoryService = request.app.state.apr
    engine = await service.engine()
    can = {
        "joins_kv": engine.joins_kv,
        "grammar_backend": engine.grammar_backend,
        "supports_seeds": engine.supports_seeds,
    }
    return as_json({**service.counters.report(), "caps": asdict(service.caps), **can})


async def ui(request: Request) -> Response:
    """A page that asks `/apr/generate`, and draws the trajectory while it is written."""
    headers = {
        "Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff", "Content-Security-Policy": "frame-ancestors 'none'",
    }  # fmt: skip
    return Response(render_live_page(), headers=headers, media_type="text/html")
