"""Turns exceptions of SGLang's request models into validation errors, which are answered with status 400.

Some validators of these models take any body for an object of the right types. `null` as a body, or `true` as a
`response_format`, raises an AttributeError there, which would be answered with status 500.
"""

from __future__ import annotations

from typing import Any

from sgl_apr.server.hooks import hook_around

# What code raises that was written for a value of another type.
WRONG_TYPE_ERRORS = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


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
        message = f"the value has a wrong type somewhere ({type(error).__name__}: {str(error)[:200]})"
        return None, [{"type": "value_error", "loc": options.get("loc", (name,)), "msg": message}]
