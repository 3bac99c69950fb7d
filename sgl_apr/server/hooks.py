"""Sets hooks on functions of SGLang, after checking that the functions are the ones that this package knows."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import version
from typing import Any

from sgl_apr.engine.sglang_names import SUPPORTED_SGLANG
from sgl_apr.errors import LaunchError

_targets: list[str] = []  # the functions with a hook, as SGLang writes their paths


def has_accelerator() -> bool:
    """Return whether SGLang would find a GPU or another accelerator."""
    import torch

    kinds = (getattr(torch, name, None) for name in ("cuda", "xpu", "npu", "musa", "mps", "hpu"))
    return any(kind is not None and kind.is_available() for kind in kinds)


def is_enabled(variable: str) -> bool:
    """Return whether a feature is on: it is unless its environment variable is "0"."""
    return os.environ.get(variable) != "0"


def check_version() -> None:
    """Check that the installed SGLang is the supported one.

    Raises:
        LaunchError: It is another version.
    """
    installed = version("sglang")
    if installed != SUPPORTED_SGLANG:
        raise LaunchError(f"SGLang {installed} is installed, but only {SUPPORTED_SGLANG} is supported")


def require_sglang(path: str, parameters: Sequence[str] = ()) -> Any:
    """Return an object of SGLang after checking that it is there.

    Args:
        path: "module:attribute", or "module:Class.attribute".
        parameters: The parameters that a function has to begin with, in this order, without `self`.

    Raises:
        LaunchError: SGLang has no such object, or the function has other parameters.
    """
    module, _, names = path.partition(":")
    try:
        target: Any = import_module(module)
        for name in names.split("."):
            target = getattr(target, name)
    except (ImportError, AttributeError) as error:
        raise LaunchError(f"this SGLang has no {path}: {error}") from error
    if parameters:
        actual = [name for name in inspect.signature(target).parameters if name != "self"]
        if actual[: len(parameters)] != list(parameters):
            raise LaunchError(f"{path} takes ({', '.join(actual)}), not ({', '.join(parameters)})")
    return target


def hook_after(path: str, parameters: Sequence[str], hook: Callable[..., Any]) -> None:
    """Call a hook after a function of SGLang.

    Args:
        path: The function, as in `require_sglang`.
        parameters: The parameters that the function has to begin with.
        hook: Called with the function's result and its arguments. What it returns replaces the result, unless it
            is None.

    Raises:
        LaunchError: SGLang has no such function.
    """
    _hook("AFTER", path, parameters, hook)


def hook_around(path: str, parameters: Sequence[str], hook: Callable[..., Any]) -> None:
    """Call a hook in place of a function of SGLang.

    Args:
        path: The function, as in `require_sglang`.
        parameters: The parameters that the function has to begin with.
        hook: Called with the function and its arguments. What it returns is the result.

    Raises:
        LaunchError: SGLang has no such function.
    """
    _hook("AROUND", path, parameters, hook)


def _hook(kind: str, path: str, parameters: Sequence[str], hook: Callable[..., Any]) -> None:
    require_sglang(path, parameters)
    register = require_sglang(
        "sglang.srt.plugins.hook_registry:HookRegistry.register", ["target", "hook", "hook_type"]
    )
    target = path.replace(":", ".")
    register(target, hook, require_sglang(f"sglang.srt.plugins.hook_registry:HookType.{kind}"))
    _targets.append(target)


def check_hooks_applied() -> None:
    """Check that SGLang has put all hooks into effect: it only logs that it could not.

    Raises:
        LaunchError: A function has no hook.
    """
    applied = require_sglang("sglang.srt.plugins.hook_registry:HookRegistry._patched")
    if missing := [target for target in _targets if target not in applied]:
        raise LaunchError(f"SGLang did not set the hooks on {', '.join(missing)}")
