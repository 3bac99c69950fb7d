"""Turns exceptions that a wrong body causes in SGLang into status 400, where they would be status 500.

Some validators of SGLang's request models take any body for an object of the right types: `null` as a body, or `true` as
a `response_format`, raises an AttributeError there. Some routes compute their answer from the body alone, and take its
fields for complete.

Pydantic lists every error of a body with its value, and FastAPI and SGLang copy that list several times. A body of 200 KB
would occupy the event loop for seconds and get a response of 100 MB. So few of many errors are listed, and a body with
long lists is first validated with few of their entries.
"""

from __future__ import annotations

import logging
from contextvars import ContextVar
from itertools import islice
from reprlib import Repr
from typing import Any

from pydantic import ValidationError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sgl_apr.errors import LaunchError
from sgl_apr.server.guard.refusal import RequestRefused, send_refusal
from sgl_apr.server.hooks import hook_around

# What code raises that was written for a value of another type.
WRONG_TYPE_ERRORS = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
# Routes whose answer depends on nothing but their body and the model's configuration.
PURE_PATHS = ("/parse_function_call", "/separate_reasoning")
ADAPTER = "_type_adapter"  # of FastAPI's model of a body
MAX_ERRORS = 20  # that a response lists
MAX_MESSAGE = 1000  # characters of one of them
SAMPLE_ENTRIES = 3  # of each type, of each list
LONG_LISTS = 10_000  # entries of all lists of a body, from which on a sample of them is validated first
# What pydantic finds in a sample, but maybe not in the complete body.
SAMPLE_ERRORS = frozenset({"too_short", "value_error", "assertion_error"})
_SHORT = Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxdict = 3, 12, 12
_SHORT.maxstring = _SHORT.maxother = 200
log = logging.getLogger(__name__)
# How many entries the lists of the current request have.
list_entries: ContextVar[int] = ContextVar("list_entries", default=0)


def body_validation_hooks(app: Any) -> list[str]:
    """Set hooks on the validation of the bodies of an application's routes.

    Args:
        app: A FastAPI application.

    Returns:
        The functions with a hook. `HookRegistry.apply_hooks` puts them into effect.

    Raises:
        LaunchError: The function of FastAPI is not as expected.
    """
    bodies = [body for route in app.routes if (body := getattr(route, "body_field", None)) is not None]
    if not all(hasattr(getattr(body, ADAPTER, None), "validate_python") for body in bodies):
        raise LaunchError(f"FastAPI's model of a body has no {ADAPTER} of pydantic")
    kinds = {type(body) for body in bodies}
    paths = [f"{kind.__module__}:{kind.__qualname__}.validate" for kind in kinds]
    for path in paths:
        hook_around(path, ["value"], validate)
    return paths


class _TooManyErrors(Exception):
    """A body has too many errors to list them.

    Attributes:
        errors: Some of them.
    """

    def __init__(self, errors: list[dict[str, Any]]) -> None:
        super().__init__("a body has too many errors")
        self.errors = errors


class BoundedAdapter:
    """A pydantic adapter that raises `_TooManyErrors` in place of a long list of errors.

    Args:
        adapter: A `TypeAdapter`.
    """

    def __init__(self, adapter: Any) -> None:
        self._adapter = adapter

    def __getattr__(self, name: str) -> Any:
        return getattr(self._adapter, name)

    def validate_python(self, value: Any, **options: Any) -> Any:
        """Validate a value, as `TypeAdapter.validate_python` does."""
        if list_entries.get() > LONG_LISTS:
            errors = self._sample_errors(value, options)
            if errors and SAMPLE_ERRORS.isdisjoint(error["type"] for error in errors):
                raise _TooManyErrors([*errors[:MAX_ERRORS], summarize("many")])
        try:
            return self._adapter.validate_python(value, **options)
        except ValidationError as error:
            if (count := error.error_count()) <= MAX_ERRORS:
                raise
        raise _TooManyErrors([*self._sample_errors(value, options)[:MAX_ERRORS], summarize(count)])

    def _sample_errors(self, value: Any, options: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the errors of a sample of a value, because pydantic can only list all of them."""
        try:
            self._adapter.validate_python(take_sample(value), **options)
        except ValidationError as error:
            return [dict(entry) for entry in error.errors(include_url=False)]
        return []


def validate(original: Any, field: Any, *args: Any, **options: Any) -> tuple[Any, Any]:
    """Validate a value as FastAPI does, list few of many errors, and return an error where a validator fails in another way.

    Returns:
        The value and None or no errors; or None and a list of errors.
    """
    adapter = getattr(field, ADAPTER)
    if type(adapter) is not BoundedAdapter:
        setattr(field, ADAPTER, BoundedAdapter(adapter))
    location = options.get("loc", ())
    try:
        result, errors = original(field, *args, **options)
        return result, [shorten_error(error) for error in errors] if errors else errors
    except _TooManyErrors as many:
        return None, [shorten_error({**error, "loc": (*location, *error["loc"])}) for error in many.errors]
    except WRONG_TYPE_ERRORS as error:
        message = f"a value has the wrong type ({describe(error)})"
        name = getattr(field, "name", "body")
        return None, [{"type": "value_error", "loc": options.get("loc", (name,)), "msg": message}]


def take_sample(value: Any) -> Any:
    """Return JSON with the first entries of each type of each list. If these are wrong, the complete list is."""
    if isinstance(value, dict):
        return {key: take_sample(entry) for key, entry in value.items()}
    if not isinstance(value, list):
        return value
    if len(value) > SAMPLE_ENTRIES:
        groups = (
            (entry for entry in value if type(entry) is kind) for kind in dict.fromkeys(map(type, value))
        )
        value = [entry for group in groups for entry in islice(group, SAMPLE_ENTRIES)]
    return [take_sample(entry) for entry in value]


def summarize(count: int | str) -> dict[str, Any]:
    """Return the last entry of a list of some of many errors."""
    message = (
        f"the body has {count} errors, of which at most {MAX_ERRORS} are listed; "
        f"lists are cut to the first {SAMPLE_ENTRIES} entries of each type"
    )
    return {"type": "too_many_errors", "loc": (), "msg": message}


def shorten_error(error: dict[str, Any]) -> dict[str, Any]:
    """Return an error of pydantic that shows no long value and has no long message."""
    shorter = dict(error)
    if "input" in error and "..." in (text := _SHORT.repr(error["input"])):
        shorter["input"] = text
    if len(error["msg"]) > MAX_MESSAGE:
        shorter["msg"] = f"{error['msg'][:MAX_MESSAGE]}..."
    return shorter


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
