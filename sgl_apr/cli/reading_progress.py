"""Shows on stderr how far a long text has been read."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from sgl_apr.formats.reading_progress import follow_reading

LONG_TEXT = 1 << 20  # characters; shorter texts take a second or two
POLL_S = 0.2


@contextmanager
def show_reading_progress(name: str, size: int) -> Iterator[None]:
    """Show a progress bar while the block reads a long text. There is none without a terminal or in a process of a pool.

    Args:
        name: Where the text comes from.
        size: Its length in characters.
    """
    if size < LONG_TEXT or multiprocessing.parent_process() is not None:
        yield
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    from sgl_apr.views.printable import printable

    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
    with (
        Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bars,
        follow_reading() as progress,
    ):
        task = bars.add_task(f"reading {escape(printable(name))}", total=size)
        ended = threading.Event()

        def poll() -> None:
            while not ended.wait(POLL_S):
                bars.update(task, completed=progress.position())

        thread = threading.Thread(target=poll, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
