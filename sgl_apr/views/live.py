"""A trajectory in the terminal while it is written, from its events alone; it prints nothing by itself."""

from __future__ import annotations

import io
import threading
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from math import ceil

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from sgl_apr.runtime.events import (
    BranchEnded,
    Delta,
    Done,
    Event,
    Forked,
    Joined,
    SpanFinished,
    TextRetracted,
)
from sgl_apr.trajectory.blocks import Outcome
from sgl_apr.trajectory.spans import Path, Span

OUTCOME_LABELS: dict[Outcome | None, tuple[str, str]] = {
    None: ("running", "blue"),
    "ok": ("done", "green"),
    "eos": ("ended early", "yellow"),
    "length": ("cut at its limit", "yellow"),
    "aborted": ("aborted", "yellow"),
    "timeout": ("out of time", "yellow"),
    "failed": ("failed", "red"),
    "malformed": ("left the dialect", "red"),
}
TAG_ROLES = ("fork", "lead", "header", "result", "tail")  # the layout says what they say
MIN_PANEL_WIDTH = 26  # columns of a branch: enough for its number and any state
MIN_TRUNK_LINES = 4  # lines of the trunk that stay in view above its branches


class LiveView:
    """Hears a trajectory (`on_event=view`) and shows it (`rich.live.Live(view)`) in the height there is.

    Below the trunk stand its branches until they are joined; then each is one line of the trunk. Any thread
    may tell it events: they are queued, and taken in when it is next shown. Model text is never markup, and
    comes without the characters that a terminal would obey.
    """

    def __init__(self, title: str) -> None:
        self._title = title
        self._events: deque[Event] = deque()
        self._showing = threading.Lock()
        self._trunk = _SequenceView()
        self._done: Done | None = None

    def __call__(self, event: Event) -> None:
        self._events.append(event)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        with self._showing:
            for _ in range(len(self._events)):
                self._apply(self._events.popleft())
            footer = (
                [_single_line(self._summary(self._done), options.max_width, "bold")] if self._done else []
            )
            height = (options.height or options.max_height) - 1 - len(footer)
            body = self._body(console, options.max_width, max(1, height))
        yield from (_single_line(self._title, options.max_width, "bold"), *body, *footer)

    def _apply(self, event: Event) -> None:
        match event:
            case Delta(path, text):
                self._sequence(path).write(text)
            case TextRetracted(path, chars):
                self._sequence(path).retry(chars)
            case SpanFinished(_, span) if span.role in TAG_ROLES and span.finish != "malformed":
                self._sequence(span.path).hide(span)
            case Forked(path, branches, first):
                for k, (number, outline) in enumerate(branches, first):
                    self._sequence((*path, k)).name = f"{number}: {outline}" if outline else number
            case BranchEnded(path, outcome):
                self._sequence(path).outcome = outcome
            case Joined(path, numbers):
                self._sequence(path[:-1]).join(path[-1], numbers)
            case Done():
                self._done = event

    def _sequence(self, path: Path) -> _SequenceView:
        sequence = self._trunk
        for key in zip(path[::2], path[1::2], strict=False):
            sequence = sequence.branches.setdefault(key, _SequenceView(str(key[1]), sequence.size))
        return sequence

    def _summary(self, done: Done) -> str:
        acted = ", ".join(dict.fromkeys(limit.limit for limit in done.limits)) or "none"
        return f"branches: {self._trunk.forked} · limits that acted: {acted} · {done.wall_s:.1f} s"

    def _body(self, console: Console, width: int, height: int) -> list[RenderableType]:
        apart = [] if self._done else [b for b in self._trunk.branches.values() if not b.joined]
        above = self._trunk.lines(console, width, height, apart)
        if not apart:
            return [*above]
        grid, taken = _branch_grid(console, apart, width, height - min(MIN_TRUNK_LINES, len(above)))
        return [*above[max(0, len(above) + taken - height) :], grid]


@dataclass(eq=False)
class _SequenceView:
    """The trunk, or a branch: what it has written, without tags, and its branches by block and number.

    `at` says where a branch stands in the text of the sequence that forked it.
    """

    name: str = ""
    at: int = 0
    outcome: Outcome | None = None
    joined: bool = False
    header: str = ""
    branches: dict[tuple[int, int], _SequenceView] = field(default_factory=dict)
    text: io.StringIO = field(default_factory=io.StringIO)

    @property
    def size(self) -> int:
        return self.text.seek(0, io.SEEK_END)

    @property
    def forked(self) -> int:
        """How many branches it has, and those of its branches."""
        return sum(1 + branch.forked for branch in self.branches.values())

    def read(self, start: int, end: int) -> str:
        start = self.text.seek(max(0, start))
        return self.text.read(max(0, end - start))

    def write(self, text: str) -> None:
        begun = self.text.seek(0, io.SEEK_END)
        if begun or text != self.header:  # a branch that begins anew has it again, but no span for it
            self.text.write(text)

    def hide(self, tag: Span) -> None:
        start = self.size - len(tag.text)
        if self.read(start, self.size) == tag.text:
            self.text.truncate(start)
        if tag.role == "header":
            self.header = tag.text

    def retry(self, chars: int | None) -> None:
        if chars is None:
            self.outcome, self.branches, chars = None, {}, self.size
        self.text.truncate(max(0, self.size - chars))

    def join(self, block: int, numbers: Collection[int]) -> None:
        """What has ended is joined as well: a join may leave branches out of the text."""
        for key, branch in list(self.branches.items()):
            if key[0] == block and not branch.joined and (key[1] in numbers or branch.outcome):
                branch.joined, branch.at = True, self.size
                self.branches[key] = self.branches.pop(key)  # so that `at` never falls

    def lines(
        self, console: Console, width: int, most: int, but: Collection[_SequenceView] = ()
    ) -> list[Text]:
        """Its last lines, with rows for its branches but those."""
        lines, end = list[Text](), self.size
        for branch in reversed(self.branches.values()):
            if branch not in but and len(lines) < most:
                after = self._wrapped(console, branch.at, end, width, most)
                lines, end = [*_rows(branch, width), *after, *lines], branch.at
        return [*self._wrapped(console, 0, end, width, most), *lines][-most:]

    def _wrapped(self, console: Console, start: int, end: int, width: int, most: int) -> list[Text]:
        """The end of a stretch, as many lines or more. Reading begins in leaps, so that lines stay as they broke."""
        leap = width * most
        text = _printable(self.read(start + max(0, (end - start) // leap - 1) * leap, end)).strip()
        return list(Text(text).wrap(console, width)) if text else []


def _branch_grid(
    console: Console, branches: Sequence[_SequenceView], width: int, height: int
) -> tuple[Table, int]:
    """Branches in panels, or in single lines where panels were too low to read; and how high that is."""
    widest = max(1, width // MIN_PANEL_WIDTH)
    rows = ceil(len(branches) / widest)
    columns, high = ceil(len(branches) / rows), height // rows
    cells: list[RenderableType]
    if high < 4 or width < MIN_PANEL_WIDTH:
        columns, high = min(widest, ceil(len(branches) / max(1, height))), 1
        cells = [_row(branch, width // columns - 1) for branch in branches]
    else:
        inside = width // columns - 4
        texts = [branch.lines(console, inside, high - 2) for branch in branches]
        high = 2 + max(1, *map(len, texts))
        cells = [_panel(b, text, inside, high) for b, text in zip(branches, texts, strict=True)]
    grid = Table.grid()
    for first in range(0, len(cells), columns):
        grid.add_row(*cells[first : first + columns])
    for column in grid.columns:
        column.width = width // columns
    return grid, high * len(grid.rows)


def _panel(branch: _SequenceView, lines: Sequence[Text], inside: int, height: int) -> Panel:
    state, style = OUTCOME_LABELS[branch.outcome]
    title, subtitle = _single_line(branch.name, inside - 2, "cyan"), Text(state, style)
    return Panel(Text("\n").join(lines), title=title, subtitle=subtitle, border_style=style, height=height)


def _row(branch: _SequenceView, width: int) -> Text:
    """A branch in one line: its state, and its last words while it runs, its first when it has ended."""
    state, style = OUTCOME_LABELS[branch.outcome]
    name = _single_line(branch.name, min(width // 3, max(6, width - len(state) - 4)), "cyan")
    row = Text.assemble(name, "  ", (state, style), "  ", no_wrap=True)
    room = max(0, width - row.cell_len)
    start = 0 if branch.outcome else branch.size - room
    row.append_text(_single_line(branch.read(start, start + 2 * room), room))
    row.truncate(max(0, width), overflow="ellipsis")
    return row


def _rows(branch: _SequenceView, width: int) -> list[Text]:
    """The row of a branch and, while it runs, those of its own branches."""
    inner = () if branch.outcome else branch.branches.values()
    below = [Text("  ", no_wrap=True).append_text(row) for b in inner for row in _rows(b, width - 2)]
    return [_row(branch, width), *below]


def _single_line(text: str, width: int, style: str = "") -> Text:
    line = Text(" ".join(_printable(text).split()), style, no_wrap=True)
    line.truncate(max(0, width), overflow="ellipsis")
    return line


def _printable(text: str) -> str:
    """Without control characters, and those that turn the direction of writing."""
    return "".join(c if c.isprintable() or c == "\n" else " " * c.isspace() for c in text)
