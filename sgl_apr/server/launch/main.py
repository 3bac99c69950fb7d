"""The server's own process: SGLang's HTTP server with our defaults; `process` starts it, nobody by hand.

Its standard input is a socket to the launcher. One JSON line goes out when the server is ready, or when it
knows why it never will be; the end of the stream comes in when the launcher is gone, however that ended.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any, NoReturn

from sgl_apr.errors import LaunchError
from sgl_apr.server.api.limits import RequestLimits, read_caps
from sgl_apr.server.kv_join.compatibility import incompatibility
from sgl_apr.server.kv_join.probe import make_client
from sgl_apr.server.kv_join.selfcheck import assert_joins_correct
from sgl_apr.server.launch.defaults import DEFAULT_POOL_TOKENS, defaults, pool_tokens
from sgl_apr.server.launch.fork_start import fork_children
from sgl_apr.server.launch.preflight import UsageError, local_config
from sgl_apr.server.plugin import CACHE, has_accelerator

# By grammar backend. They are small, but the first grammar of a process compiles a torch kernel.
WARMUP_GRAMMARS = {"llguidance": 'start: "ok" /[a-z]{1,4}/', "xgrammar": 'root ::= "ok" [a-z]{1,4}'}
WARMUP_TIMEOUT_S = 600.0  # seconds for the warm-up request


def main(argv: list[str]) -> None:
    launcher = _connect()
    try:
        caps, argv = read_caps(argv)
        args = server_args(argv)
        _add_routes(caps)
        if not has_accelerator():
            fork_children(launcher)
    except LaunchError as error:
        _notify_launcher(launcher, error=str(error), usage=isinstance(error, UsageError))
        sys.exit(1)

    def ready() -> None:
        try:
            _warm_up(args)
            if resolving_view(args).radix_cache_backend == CACHE and not args.skip_server_warmup:
                assert_joins_correct(make_client(args.url(), args.api_key))
        except LaunchError as error:
            _notify_launcher(launcher, error=str(error), usage=False)
        else:
            view = resolving_view(args)
            _notify_launcher(launcher, url=args.url(), device=view.device, attention=view.attention_backend)

    from sglang.srt.arg_groups.overrides import resolving_view
    from sglang.srt.entrypoints.http_server import launch_server
    from sglang.srt.utils import kill_process_tree

    try:
        launch_server(args, launch_callback=ready)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


def _add_routes(caps: RequestLimits) -> None:
    from sgl_apr.server.api.routes import install  # only now: it imports SGLang, whose plugins come first

    install(caps)


def _connect() -> socket.socket:
    """Takes the socket away from standard input, so that no child holds it, and watches it."""
    launcher = socket.socket(fileno=os.dup(0))
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)

    def watch() -> None:
        while launcher.recv(64):
            pass
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=watch, name="launcher", daemon=True).start()
    return launcher


def _notify_launcher(launcher: socket.socket, **message: object) -> None:
    launcher.sendall(json.dumps(message).encode() + b"\n")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def server_args(argv: list[str]) -> Any:
    """SGLang's ServerArgs of the user's flags after our defaults; LaunchError if they cannot work."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sgl_apr.server import plugin

    if not plugin.activated:
        raise LaunchError(
            "SGLang did not load the plugin of sgl-apr: is it installed, and in SGLANG_PLUGINS?"
        )
    from sglang.srt.arg_groups.overrides import model_config_of, resolving_view
    from sglang.srt.platforms import current_platform
    from sglang.srt.server_args import ServerArgs, prepare_server_args
    from sglang.srt.utils.server_args_config_parser import ConfigArgumentMerger

    parser = _Parser(prog="sgl-apr serve", add_help=False)
    ServerArgs.add_cli_args(parser)
    try:
        merged = ConfigArgumentMerger(parser).merge_config_with_args(argv) if "--config" in argv else argv
        wanted = parser.parse_args(merged)
    except (ValueError, OSError) as error:  # of the configuration file
        raise UsageError(str(error)) from error
    accelerator = has_accelerator()
    if not accelerator and type(current_platform).__name__ != "TorchCpuPlatform":
        raise LaunchError(f"SGLang runs on {current_platform!r} instead of the CPU platform of sgl-apr")
    config = _config(wanted.model_path, wanted.revision)
    tokens = DEFAULT_POOL_TOKENS if accelerator else _affordable_tokens(config)
    given = [*defaults(accelerator=accelerator, max_tokens=tokens, config=config), *merged]
    args = prepare_server_args(given)
    args.resolve_once()
    cache = wanted.radix_cache_backend
    if cache in (None, plugin.CACHE) and (
        what := incompatibility(resolving_view(args), model_config_of(args))
    ):
        if cache:
            raise UsageError(f"--radix-cache-backend {cache} does not work with {what}")
        print(
            f"sgl-apr: branches are not joined in the KV cache: that does not work with {what}",
            file=sys.stderr,
        )
    elif cache is None:
        args = prepare_server_args([*given, "--radix-cache-backend", plugin.CACHE])
        args.resolve_once()
    view = resolving_view(args)
    for flag, refused in (
        ("--tokenizer-worker-num above 1", view.tokenizer_worker_num > 1),
        ("gRPC", view.grpc_mode or view.smg_grpc_mode or view.grpc_port is not None),
        ("--encoder-only", view.encoder_only),
        ("--use-ray", view.use_ray),
        ("SGLANG_RUST_SERVER", os.environ.get("SGLANG_RUST_SERVER", "0").lower() in {"1", "true"}),
    ):
        if refused:
            raise UsageError(f"{flag} is not supported")
    return args


def _config(model: str, revision: str | None) -> dict[str, Any]:
    """What config.json of a model says, as far as it is on this machine."""
    path = local_config(model, revision or "main")
    found: dict[str, Any] = {} if path is None else json.loads(path.read_text())
    return found


def _affordable_tokens(config: Mapping[str, Any]) -> int:
    import psutil

    return pool_tokens(config, psutil.virtual_memory().available)


def _warm_up(args: Any) -> None:
    """Constrained requests, as SGLang has warmed up everything else; LaunchError if one is refused.

    The mask kernel is compiled for one row, and once more for any other number of them.
    """
    if args.grammar_backend not in WARMUP_GRAMMARS or args.skip_tokenizer_init:
        return
    headers = {"Content-Type": "application/json"}
    if args.api_key:
        headers["Authorization"] = f"Bearer {args.api_key}"
    for texts in (["a"], ["a", "b"], ["a", "b", "c"]):
        body = {
            "text": texts,
            "sampling_params": {"max_new_tokens": 4, "ebnf": WARMUP_GRAMMARS[args.grammar_backend]},
        }
        _post(urllib.request.Request(f"{args.url()}/generate", json.dumps(body).encode(), headers))


def _post(request: urllib.request.Request) -> None:
    """Send it once somebody listens: with --skip-server-warmup that may take a moment."""
    deadline = time.monotonic() + WARMUP_TIMEOUT_S
    while True:
        try:
            urllib.request.urlopen(request, timeout=WARMUP_TIMEOUT_S).close()
            return
        except urllib.error.HTTPError as error:
            answer = error.read().decode(errors="replace")[:300]
            raise LaunchError(f"constrained decoding does not work with this model: {answer}") from error
        except OSError as error:
            if time.monotonic() > deadline:
                raise LaunchError(f"the server does not answer: {error}") from error
            time.sleep(0.2)


if __name__ == "__main__":
    main(sys.argv[1:])
