"""The main process of a server: SGLang's HTTP server with the defaults of this package. `process` starts it.

Its standard input is a socket to the launcher. The process reads one JSON line with the flags that are secret, and
sends one, either when the server is ready or when it fails to start. It reads the end of the stream when the launcher
is gone, however the launcher ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from sgl_apr.errors import LaunchError
from sgl_apr.server.api.config import ApiConfig, parse_api_arguments
from sgl_apr.server.guard.limits import GuardLimits, parse_guard_arguments
from sgl_apr.server.guard.origin_checks import is_loopback
from sgl_apr.server.hooks import has_accelerator
from sgl_apr.server.launch.arguments import launch_arguments
from sgl_apr.server.launch.fast_imports import fast_imports
from sgl_apr.server.launch.fork_start import fork_children
from sgl_apr.server.launch.served_model import import_only_served_model
from sgl_apr.server.launch.server_folder import (
    keep_metrics_in,
    lock_folder,
    remove_folder,
    this_servers_folder,
)
from sgl_apr.server.launch.usage import UsageError
from sgl_apr.server.launch.warmup import check_joins, wait_until_listening, warm_up_grammars, warm_up_sglang


def main(argv: list[str]) -> None:
    """Run a server until it is stopped.

    Args:
        argv: The flags of this package and of SGLang.
    """
    folder = _lock_own_folder()
    launcher, secret_flags = _connect_launcher(folder)
    try:
        config, argv = parse_api_arguments(argv)
        config = _load_tools(config)
        guard_limits, argv = parse_guard_arguments(argv)
        with fast_imports():
            launched = launch_arguments([*argv, *secret_flags])
            args = launched.args
            if folder is not None and args.enable_metrics:
                keep_metrics_in(folder)
            _add_routes(replace(config, attention=launched.attention))
            _guard_requests(guard_limits, args.host)
        import_only_served_model(args)
        if not has_accelerator():
            fork_children(launcher)
    except LaunchError as error:
        _notify_launcher(launcher, error=str(error), usage=isinstance(error, UsageError))
        sys.exit(1)

    def report_ready() -> None:
        view = resolving_view(args)
        _notify_launcher(
            launcher,
            url=args.url(),
            device=view.device,
            attention=launched.attention,
            warning=_warning(args),
        )

    def ready() -> None:
        try:
            warm_up_grammars(args)
            check_joins(args)
        except LaunchError as error:
            _notify_launcher(launcher, error=str(error), usage=False)
        else:
            report_ready()

    def follow() -> None:
        wait_until_listening(args)
        report_ready()

    from sglang.srt.arg_groups.overrides import resolving_view
    from sglang.srt.entrypoints.http_server import launch_server
    from sglang.srt.utils import kill_process_tree

    if resolving_view(args).node_rank > 0:  # SGLang calls `ready` on the first node only
        threading.Thread(target=follow, daemon=True).start()
    try:
        launch_server(args, execute_warmup_func=warm_up_sglang, launch_callback=ready)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


def _load_tools(config: ApiConfig) -> ApiConfig:
    """Load the operator's tools, and check that their MCP servers start."""
    if not config.tools and "tools" not in config.default_options:
        return config
    from sgl_apr.server.api.tools.operator_tools import check_tools
    from sgl_apr.server.api.tools.sources import load_tool_sources

    sources = load_tool_sources(config.tools)
    asyncio.run(check_tools(sources, config.default_options.get("tools")))
    return replace(config, tool_sources=sources)


def _add_routes(config: ApiConfig) -> None:
    from sgl_apr.server.api.install import install  # imports SGLang, which has to load its plugins first

    install(config)


def _guard_requests(limits: GuardLimits, host: str) -> None:
    from sgl_apr.server.guard.install import install_guard  # imports SGLang's server, as above

    install_guard(limits, host)


def _lock_own_folder() -> Path | None:
    """Keep the server's folder locked as long as this process or a fork of it lives, and return it."""
    folder = this_servers_folder()
    if folder is not None:
        lock_folder(folder)
    return folder


def _connect_launcher(folder: Path | None) -> tuple[socket.socket, list[str]]:
    """Take the socket to the launcher from standard input, and kill this session when the launcher is gone.

    Args:
        folder: The server's folder, which is then removed.

    Returns:
        The socket, and the flags that are secret.
    """
    launcher = socket.socket(fileno=os.dup(0))  # not inheritable, so no child holds it
    devnull = os.open(os.devnull, os.O_RDONLY)
    os.dup2(devnull, 0)
    os.close(devnull)
    received = b""
    while not received.endswith(b"\n"):
        if not (chunk := launcher.recv(65536)):
            sys.exit(1)
        received += chunk

    def watch() -> None:
        while launcher.recv(64):
            pass
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        if folder is not None:
            remove_folder(folder)
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=watch, name="launcher", daemon=True).start()
    return launcher, json.loads(received)


def _notify_launcher(launcher: socket.socket, **message: object) -> None:
    launcher.sendall(json.dumps(message).encode() + b"\n")


def _warning(args: Any) -> str:
    """Return a warning if other machines can use the server without a key."""
    if args.api_key or is_loopback(args.host):
        return ""
    return (
        f"the server listens on {args.host} without a key, so everybody who reaches port {args.port} can use it "
        "(set SGL_APR_API_KEY or --api-key-file FILE, or listen on --host 127.0.0.1)"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
