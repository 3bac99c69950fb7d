"""Adds our routes to SGLang's HTTP server, and the object `apr` to the bodies of OpenAI's routes.

POST /v1/chat/completions, /v1/completions   with an object `apr` in the body, or a model "NAME:apr"; else they are SGLang's
POST /v1/responses, /v1/messages             the same
GET  /v1/models, /v1/models/NAME             SGLang's, and the model "NAME:apr"
POST /apr/generate                           takes a prompt, returns a trajectory or streams its events
POST /apr/fork                               takes a context and tasks, answers all of them at once
GET  /apr/dialects                           the dialects that a trajectory can be written in
GET  /apr/tools                              the tools that this server runs
GET  /apr/stats                              counts of what has run so far
GET  /apr/ui                                 a page to send prompts and watch trajectories; it opens without an API key
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.responses import HTMLResponse
from starlette.middleware import Middleware

from sgl_apr.errors import LaunchError
from sgl_apr.server.api import http
from sgl_apr.server.api.apr_routes import AprRoutes
from sgl_apr.server.api.chat.plain_messages import apply_conversation_template, apply_jinja_template
from sgl_apr.server.api.chat.template import validate_chat_request
from sgl_apr.server.api.config import ApiConfig
from sgl_apr.server.api.fork import service as fork_service
from sgl_apr.server.api.handlers import RequestHandlers
from sgl_apr.server.api.openai.model_alias import make_models_router
from sgl_apr.server.api.schemas import describe_openapi, json_body, json_responses
from sgl_apr.server.api.service import TrajectoryService
from sgl_apr.server.hooks import hook_around, require_sglang

UI_PATH = "/apr/ui"
HANDLE_REQUEST = "sglang.srt.entrypoints.openai.serving_base:OpenAIServingBase.handle_request"
RESPONSES = "sglang.srt.entrypoints.openai.serving_responses:OpenAIServingResponses"
MESSAGES = "sglang.srt.entrypoints.anthropic.serving:AnthropicServing"
CREATE_RESPONSES, HANDLE_MESSAGES = f"{RESPONSES}.create_responses", f"{MESSAGES}.handle_messages"
DECIDE_AUTH = "sglang.srt.utils.auth:decide_request_auth"


def install(config: ApiConfig) -> None:
    """Add the API to the server that this process is about to launch.

    Raises:
        LaunchError: SGLang lacks a function that is needed, or a hook was not set.
    """
    server = "sglang.srt.entrypoints.http_server"
    app, state = require_sglang(f"{server}:app"), require_sglang(f"{server}:get_global_state")
    chat = require_sglang("sglang.srt.entrypoints.openai.serving_chat:OpenAIServingChat")
    completion = require_sglang("sglang.srt.entrypoints.openai.serving_completions:OpenAIServingCompletion")
    for serving in (chat, completion):
        path = f"{serving.__module__}:{serving.__name__}"
        require_sglang(f"{path}._convert_to_internal_request", ["request", "raw_request"])
        require_sglang(f"{path}._validate_request")
    require_sglang(f"{RESPONSES}._construct_input_messages", ["request"])
    require_sglang(f"{MESSAGES}._convert_to_chat_completion_request", ["anthropic_request"])
    handlers = RequestHandlers(config, chat, completion)
    hooks: tuple[tuple[str, list[str], Any], ...] = (
        (f"{chat.__module__}:{chat.__name__}._validate_request", ["request"], validate_chat_request),
        (HANDLE_REQUEST, ["request", "raw_request"], handlers.completion_request),
        (CREATE_RESPONSES, ["request", "raw_request"], handlers.response_request),
        (HANDLE_MESSAGES, ["request", "raw_request"], handlers.message_request),
        (DECIDE_AUTH, ["method", "path"], allow_ui_without_key),
    )
    if config.plain_messages:
        path = f"{chat.__module__}:{chat.__name__}"
        jinja, conversation = f"{path}._apply_jinja_template", f"{path}._apply_conversation_template"
        hooks += (
            (jinja, ["request", "tools", "is_multimodal"], apply_jinja_template),
            (conversation, ["request", "is_multimodal"], apply_conversation_template),
        )
    originals = [require_sglang(path) for path, _, _ in hooks]
    for path, parameters, hook in hooks:
        hook_around(path, parameters, hook)
    require_sglang("sglang.srt.plugins.hook_registry:HookRegistry").apply_hooks()
    for (path, _, _), original in zip(hooks, originals, strict=True):
        if require_sglang(path) is original:  # SGLang logs a failed hook and continues
            raise LaunchError(f"could not set a hook on {path}")
    # Before SGLang's routes of the same paths.
    app.router.routes[:0] = make_models_router(lambda: state().tokenizer_manager).routes
    app.user_middleware.append(Middleware(AprRoutes))
    describe_openapi(app)
    app.include_router(make_router(lambda: TrajectoryService(state().tokenizer_manager, config)))


def make_router(make_service: Callable[[], TrajectoryService]) -> APIRouter:
    """Return our routes. The service is made when the application starts, and kept in `app.state.apr`."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.apr = service = make_service()
        await service.start()
        yield
        await service.close()

    router = APIRouter(lifespan=lifespan)
    router.add_api_route(
        "/apr/generate",
        http.generate,
        methods=["POST"],
        openapi_extra=json_body("GenerateRequest"),
        responses=json_responses("Trajectory", events="Event"),
    )
    router.add_api_route(
        "/apr/fork",
        fork_service.fork,
        methods=["POST"],
        openapi_extra=json_body("ForkRequest"),
        responses=json_responses("ForkResult", events="ForkEvent"),
    )
    router.add_api_route(
        "/apr/dialects", http.dialects, methods=["GET"], responses=json_responses("Dialects")
    )
    router.add_api_route("/apr/tools", http.tools, methods=["GET"], responses=json_responses("Tools"))
    router.add_api_route("/apr/stats", http.stats, methods=["GET"], responses=json_responses("Stats"))
    router.add_api_route(UI_PATH, http.ui, methods=["GET"], response_class=HTMLResponse)
    return router


def allow_ui_without_key(decide: Callable[..., Any], **request: Any) -> Any:
    """Decide whether a request is allowed, as SGLang does, except that the page of `/apr/ui` needs no API key.

    A browser cannot send the key before there is a field for it. The page contains no data, and all requests that it
    sends need the key.
    """
    if request["method"] == "GET" and request["path"] == UI_PATH:
        return require_sglang("sglang.srt.utils.auth:AuthDecision")(allowed=True)
    return decide(**request)
