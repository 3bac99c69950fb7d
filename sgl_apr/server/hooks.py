"""Hooks on functions of SGLang, checked before they are set."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import version
from typing import Any

from sgl_apr.engine.sglang_names import SUPPORTED_SGLANG
from sgl_apr.errors import LaunchError


def has_accelerator() -> bool:
    """Whether SGLang would find a GPU or another accelerator."""
    import torch

    kinds = (getattr(torch, name, None) for name in ("cuda", "xpu", "npu", "musa", "mps", "hpu"))
    return any(kind is not None and kind.is_available() for kind in kinds)


def check_version() -> None:
    """Raises LaunchError unless the installed SGLang is the one whose seams are known."""
    found = version("sglang")
    if found != SUPPORTED_SGLANG:
        raise LaunchError(f"SGLang {found} is installed, but only {SUPPORTED_SGLANG} is supported")


def require_sglang(path: str, parameters: Sequence[str] = ()) -> Any:
    """What SGLang has at "module:attribute", if it takes `parameters` in this order; else LaunchError."""
    module, _, names = path.partition(":")
    try:
        found: Any = import_module(module)
        for name in names.split("."):
            found = getattr(found, name)
    except (ImportError, AttributeError) as error:
        raise LaunchError(f"this SGLang has no {path}: {error}") from error
    if parameters:
        taken = [name for name in inspect.signature(found).parameters if name != "self"]
        if taken[: len(parameters)] != list(parameters):
            raise LaunchError(f"{path} takes ({', '.join(taken)}), not ({', '.join(parameters)})")
    return found


def hook_after(path: str, parameters: Sequence[str], hook: Callable[..., Any]) -> None:
    """Call `hook` with what a function of SGLang returned, and with what it was given."""
    _hook("AFTER", path, parameters, hook)


def hook_around(path: str, parameters: Sequence[str], hook: Callable[..., Any]) -> None:
    """Call `hook` in place of a function of SGLang, with that function and what it was given."""
    _hook("AROUND", path, parameters, hook)


def _hook(kind: str, path: str, parameters: Sequence[str], hook: Callable[..., Any]) -> None:
    require_sglang(path, parameters)
    register = require_sglang(
        "sglang.srt.plugins.hook_registry:HookRegistry.register", ["target", "hook", "hook_type"]
    )
    register(
        path.replace(":", "."), hook, require_sglang(f"sglang.srt.plugins.hook_registry:HookType.{kind}")
    )
