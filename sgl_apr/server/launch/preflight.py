"""What can be known to fail before SGLang is started: version, model, port. Seconds, where SGLang takes a minute."""

from __future__ import annotations

import argparse
import os
import socket
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sgl_apr.errors import LaunchError
from sgl_apr.server.hooks import check_version
from sgl_apr.server.launch.usage import UsageError

HUB_TIMEOUT_S = 5.0  # seconds for the hub to answer


@dataclass(frozen=True, slots=True)
class LaunchRequest:
    """What is read from a command line before SGLang reads all of it. `model` is None if a file has it."""

    model: str | None
    revision: str
    host: str
    port: int


def read_arguments(argv: Sequence[str]) -> LaunchRequest:
    """Raises UsageError; flags that are not needed here are left to SGLang."""
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    parser.add_argument("--model-path", "--model")
    parser.add_argument("--revision", default="main")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=30000)
    parser.add_argument("--config")
    try:
        found, _ = parser.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        raise UsageError(str(error)) from None
    if found.model_path is None and found.config is None:
        raise UsageError("no model: give --model DIRECTORY, or a Hugging Face id")
    return LaunchRequest(found.model_path, found.revision, found.host, found.port)


def check_launch(wanted: LaunchRequest) -> dict[str, str]:
    """Raises LaunchError where a launch would fail; returns what the server's environment needs."""
    check_version()
    reserve_port(wanted).close()
    return {} if wanted.model is None else _check_model(wanted.model, wanted.revision)


def reserve_port(wanted: LaunchRequest) -> socket.socket:
    """Has the port until it is closed, so that nobody else gets it while SGLang starts, who may all the same.

    Two sockets may be bound to one port if both allow it and one listens at the most. Raises LaunchError.
    """
    host, port = wanted.host, wanted.port
    held = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        held.bind((host, port))
    except (OSError, OverflowError) as error:
        held.close()
        raise LaunchError(f"cannot listen on {host}:{port}: {error}") from error
    return held


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nobody listens on now."""
    with socket.create_server((host, 0)) as listener:
        return int(listener.getsockname()[1])


def local_config(model: str, revision: str = "main") -> Path | None:
    """Where the config.json of a model is on this machine: in its directory, or in the hub's cache."""
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
        return {}  # one file (GGUF), object storage or another hub: SGLang's matter
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise LaunchError(f"{model} is not a model: there is no config.json in it")
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
        return {"HF_HUB_OFFLINE": "1"}  # spares SGLang's processes minutes of retries
    return {}


def _check_hub(model: str, revision: str) -> None:
    from huggingface_hub import get_token

    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    request = urllib.request.Request(f"{endpoint}/{model}/resolve/{revision}/config.json", method="HEAD")
    if token := get_token():
        request.add_header("Authorization", f"Bearer {token}")
    try:
        urllib.request.urlopen(request, timeout=HUB_TIMEOUT_S).close()
    except urllib.error.HTTPError as error:
        raise LaunchError(f"{endpoint} answers {error.code} {error.reason}") from error
    except OSError as error:
        raise LaunchError(f"{endpoint} cannot be reached") from error
