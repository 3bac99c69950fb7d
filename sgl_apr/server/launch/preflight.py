"""Checks version, model and port before SGLang starts, in seconds, where SGLang would take a minute to fail."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sgl_apr.engine.http_client import check_exists
from sgl_apr.errors import EngineError, LaunchError
from sgl_apr.runtime.value_checks import shorten
from sgl_apr.server.api.config import parse_api_arguments
from sgl_apr.server.guard.limits import parse_guard_arguments
from sgl_apr.server.hooks import check_version
from sgl_apr.server.launch.help import own_flags
from sgl_apr.server.launch.sglang_flags import check_flags
from sgl_apr.server.launch.usage import UsageError, UsageParser

HUB_TIMEOUT_S = 5.0  # seconds for the hub to answer


@dataclass(frozen=True, slots=True)
class LaunchRequest:
    """The arguments that are read before SGLang parses the whole command line.

    Attributes:
        model: A directory or a Hugging Face id. None if a configuration file names it.
        revision: The model's revision on the hub.
        host: The address to listen on.
        port: The port to listen on.
    """

    model: str | None
    revision: str
    host: str
    port: int


def read_arguments(argv: Sequence[str]) -> LaunchRequest:
    """Parse the flags that are needed here. All others are left to SGLang.

    Raises:
        UsageError: A value is wrong, or there is no model.
    """
    parser = UsageParser(add_help=False)
    parser.add_argument("--model-path", "--model")
    parser.add_argument("--revision", default="main")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=30000)
    parser.add_argument("--config")
    parsed, _ = parser.parse_known_args(list(argv))
    _, others = parse_api_arguments(argv)
    _, others = parse_guard_arguments(others)
    check_flags(others, own_flags())
    if parsed.model_path is None and parsed.config is None:
        raise UsageError("no model: give --model DIRECTORY, or a Hugging Face id")
    return LaunchRequest(parsed.model_path, parsed.revision, parsed.host, parsed.port)


def check_launch(request: LaunchRequest) -> dict[str, str]:
    """Check that a launch can succeed.

    Returns:
        Environment variables that the server needs.

    Raises:
        LaunchError: SGLang is not the supported version, the port is taken, or the model does not exist.
    """
    check_version()
    reserve_port(request).close()
    return {} if request.model is None else _check_model(request.model, request.revision)


def reserve_port(request: LaunchRequest) -> socket.socket:
    """Bind the port, so that no other process gets it while SGLang starts.

    SGLang can bind it too: two sockets may be bound to one port if both allow it and at most one listens.

    Returns:
        The bound socket. Close it to free the port.

    Raises:
        LaunchError: The port cannot be bound.
    """
    host, port = request.host, request.port
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        bound.close()
        raise LaunchError(f"cannot listen on {host}:{port}: {error}") from error
    return bound


def free_port(host: str = "127.0.0.1") -> int:
    """Return a port that no process listens on now."""
    with socket.create_server((host, 0)) as listener:
        return int(listener.getsockname()[1])


def local_config(model: str, revision: str = "main") -> Path | None:
    """Return the path of a model's config.json, in its directory or in the hub's cache, or None if it is not there."""
    path = Path(model) / "config.json"
    if path.is_file():
        return path
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(model, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(cached) if isinstance(cached, str) else None


def _check_model(model: str, revision: str) -> dict[str, str]:
    path = Path(model)
    if path.is_file() or "://" in model or os.environ.get("SGLANG_USE_MODELSCOPE"):
        return {}  # a single file (GGUF), object storage or another hub: SGLang checks these
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise LaunchError(f"{model} is not a model: there is no config.json in it")
        _check_config(path / "config.json")
        return {}
    if path.is_absolute() or model.startswith(".") or model.count("/") > 1:
        raise LaunchError(f"there is no model directory {model}")
    cached = local_config(model, revision) is not None
    try:
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
            raise LaunchError("HF_HUB_OFFLINE is set")
        _check_hub(model, revision)
    except LaunchError as error:
        if not cached:
            raise LaunchError(f"no model {model}: no such directory, not in the cache, and {error}") from None
        return {"HF_HUB_OFFLINE": "1"}  # without it SGLang's processes retry for minutes
    return {}


def _check_config(path: Path) -> None:
    """Check that a config.json is a JSON object. SGLang would print a traceback a minute later."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise LaunchError(f"{path} cannot be read: {error}, expected a JSON object") from error
    if not isinstance(config, dict):
        raise LaunchError(f"{path} is {shorten(config)}, expected a JSON object")


def _check_hub(model: str, revision: str) -> None:
    from huggingface_hub import get_token

    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    url = f"{endpoint}/{model}/resolve/{revision}/config.json"
    try:
        check_exists(url, api_key=get_token(), timeout=HUB_TIMEOUT_S)
    except EngineError as error:
        if error.status is None:
            raise LaunchError(f"{endpoint} cannot be reached") from error
        raise LaunchError(f"{endpoint} answers {error.status}") from error
