"""Turns exceptions that a wrong body causes in SGLang into status 400, where they would be status 500.

Some validators of SGLang's request models take any body for an object of the right types: `null` as a body, or `true` as
a `response_format`, raises an AttributeError there. Some routes compute their answer from the body alone, and take its
fields for complete.
"""

from __future__ import annotations

import logging
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sgl_apr.server.guard.refusal import RequestRefused, send_refusal
from sgl_apr.server.hooks import hook_around

# What code raises that was written for a value of another type.
WRONG_TYPE_ERRORS = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
# Routes whose answer depends on nothing but their body and the model's configuration.
PURE_PATHS = ("/parse_function_call", "/separate_reasoning")
log = logging.getLogger(__name__)


def body_validation_hooks(app: Any) -> list[str]:
    """Set hooks on the validation of the bodies of an application's routes.

    Args:
        app: A FastAPI application.

    Returns:
        The functions with a hook. `HookRegistry.apply_hooks` puts them into effect.

    Raises:
        LaunchError: The function of FastAPI is not as expected.
    """
    bodies = [getattr(route, "body_field", None) for route in app.routes]
    kinds = {type(body) for body in bodies if body is not None}
    paths = [f"{kind.__module__}:{kind.__qualname__}.validate" for kind in kinds]
    for path in paths:
        hook_around(path, ["value"], validate)
    return paths


def validate(original: Any, field: Any, *args: Any, **options: Any) -> tuple[Any, Any]:
    """Validate a value as FastAPI does, and return an error where a validator fails in another way.

    Returns:
        The value and None or no errors; or None and a list of errors.
    """
    try:
        result: tuple[Any, Any] = original(field, *args, **options)
        return result
    except WRONG_TYPE_ERRORS as error:
        name = getattr(field, "name", "body")
        message = f"a value has the wrong type ({describe(error)})"
        return None, [{"type": "value_error", "loc": options.get("loc", (name,)), "msg": message}]


class PureRoutes:
    """Answers status 400 where a route of `PURE_PATHS` fails. ASGI."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http" or scope["path"] not in PURE_PATHS:
            await self._app(scope, receive, send)
            return
        started = False

        async def send_noted(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, send_noted)
        except WRONG_TYPE_ERRORS as error:
            if started:
                raise
            log.warning("%s failed", scope["path"], exc_info=error)
            refusal = RequestRefused(f"{scope['path']} cannot use these values ({describe(error)})")
            await send_refusal(refusal, scope["path"], send, close=False)


def describe(error: Exception) -> str:
    """Return the name and the text of an exception in one short line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
