"""The server's own process: SGLang's HTTP server with our defaults; `process` starts it, nobody by hand.

Its standard input is a socket to the launcher. One JSON line goes out when the server is ready, or when it
knows why it never will be; the end of the stream comes in when the launcher is gone, however that ended.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from typing import Any

from sgl_apr.engine.sglang_names import RADIX_CACHE_BACKEND
from sgl_apr.errors import LaunchError
from sgl_apr.server.api.limits import RequestLimits, read_caps
from sgl_apr.server.hooks import has_accelerator
from sgl_apr.server.kv_join.probe import make_client
from sgl_apr.server.kv_join.selfcheck import assert_joins_correct
from sgl_apr.server.launch.arguments import server_args
from sgl_apr.server.launch.fork_start import fork_children
from sgl_apr.server.launch.usage import UsageError

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
            if (
                resolving_view(args).radix_cache_backend == RADIX_CACHE_BACKEND
                and not args.skip_server_warmup
            ):
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
