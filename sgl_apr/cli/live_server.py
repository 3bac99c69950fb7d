"""The server and the live view of a command that sends one prompt: those of --model, --url and --live."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sgl_apr.views.live import LiveView


@contextmanager
def live_server(options: argparse.Namespace, title: str) -> Iterator[LiveView | None]:
    """Start a server for --model, whose address becomes `options.url`, and show what branches write with --live.

    Args:
        options: The options of the command.
        title: The title of the view.

    Yields:
        The view, which receives the events; None without --live.
    """
    with ExitStack() as stack:
        if options.model:
            from sgl_apr.server.launch.launcher import Server
            from sgl_apr.training.models import locate_model

            server = Server(locate_model(options.model), api_key=options.api_key)
            options.url = stack.enter_context(server).url
        if not options.live:
            yield None
            return
        from rich.console import Console
        from rich.live import Live

        from sgl_apr.views.live import LiveView

        view, console = LiveView(title), Console(stderr=True)  # so that the result on stdout can be piped
        stack.enter_context(Live(view, console=console, refresh_per_second=8, transient=console.is_terminal))
        yield view
