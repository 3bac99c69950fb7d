"""Shows a trajectory in the terminal while it is written, from its events."""

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
    ToolCalled,
    ToolReturned,
)
from sgl_apr.trajectory.blocks import Outcome
from sgl_apr.trajectory.spans import Path, Span
from sgl_apr.trajectory.tool_calls import ToolCall
from sgl_apr.views.printable import printable
from sgl_apr.views.tool_text import describe_result, describe_tool, single_line

OUTCOME_LABELS: dict[Outcome | None, tuple[str, str]] = {
    None: ("running", "blue"),
    "ok": ("done", "green"),
    "eos": ("ended early", "yellow"),
    "length": ("token limit", "yellow"),
    "aborted": ("aborted", "yellow"),
    "timeout": ("out of time", "yellow"),
    "failed": ("failed", "red"),
    "malformed": ("malformed", "red"),
}
TAG_ROLES = (
    "fork",
    "lead",
    "header",
    "result",
    "tail",
    "call",
    "observation",
)  # not shown: the arrangement on the screen replaces them, or lines about the tools
MIN_PANEL_WIDTH = 26  # columns that fit the number and any state of a branch
MIN_TRUNK_LINES = 4  # lines of the trunk that stay visible above its branches


class LiveView:
    """Receives the events of a trajectory (`on_event=view`) and shows it (`rich.live.Live(view)`).

    It uses the height of the terminal. Branches are shown below the trunk until they are joined. After that each
    branch is one line of the trunk. A call of a tool is one line, and so is its result; while a tool runs, the state of its
    sequence names it. Any thread may send events. They are queued and applied when the view is next
    rendered. The text of a model is never markup, and has no control characters.

    Args:
        title: The first line.
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
            case ToolCalled(path, call_id, name, arguments):
                self._sequence(path).call_tool(call_id, name, arguments)
            case ToolReturned(_, call):
                self._sequence(call.path).end_tool(call)
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
        limits = ", ".join(dict.fromkeys(limit.limit for limit in done.limits)) or "none"
        return f"branches: {self._trunk.forked} · limits reached: {limits} · {done.wall_s:.1f} s"

    def _body(self, console: Console, width: int, height: int) -> list[RenderableType]:
        unjoined = [] if self._done else [b for b in self._trunk.branches.values() if not b.joined]
        trunk = self._trunk.lines(console, width, height, unjoined)
        if self._trunk.tools and not self._done:
            trunk = [
                *trunk[max(0, len(trunk) + 1 - height) :],
                _single_line(self._trunk.state[0], width, "blue"),
            ]
        if not unjoined:
            return [*trunk]
        grid, used = _branch_grid(console, unjoined, width, height - min(MIN_TRUNK_LINES, len(trunk)))
        return [*trunk[max(0, len(trunk) + used - height) :], grid]


@dataclass(eq=False)
class _SequenceView:
    """The trunk or a branch: its text without tags, and its own branches by block and number.

    `position` is where a branch is in the text of the sequence that forked it.
    """

    name: str = ""
    position: int = 0
    outcome: Outcome | None = None
    joined: bool = False
    header: str = ""
    branches: dict[tuple[int, int], _SequenceView] = field(default_factory=dict)
    text: io.StringIO = field(default_factory=io.StringIO)
    tools: dict[str, str] = field(default_factory=dict)  # by call: the tools that run

    @property
    def size(self) -> int:
        return self.text.seek(0, io.SEEK_END)

    @property
    def state(self) -> tuple[str, str]:
        """Its outcome in words, or what it is doing, and the style of these words."""
        if self.tools and self.outcome is None:
            more = f" and {len(self.tools) - 1} more" if len(self.tools) > 1 else ""
            return f"runs {next(iter(self.tools.values()))}{more}", "blue"
        return OUTCOME_LABELS[self.outcome]

    @property
    def forked(self) -> int:
        """The number of its branches, including nested ones."""
        return sum(1 + branch.forked for branch in self.branches.values())

    def read(self, start: int, end: int) -> str:
        start = self.text.seek(max(0, start))
        return self.text.read(max(0, end - start))

    def write(self, text: str) -> None:
        length = self.text.seek(0, io.SEEK_END)
        if length or text != self.header:  # a retried branch repeats its header, without a span for it
            self.text.write(text)

    def hide(self, tag: Span) -> None:
        start = self.size - len(tag.text)
        if self.read(start, self.size) == tag.text:
            self.text.truncate(start)
        if tag.role == "header":
            self.header = tag.text

    def call_tool(self, call_id: str, name: str, arguments: str) -> None:
        self.tools[call_id] = single_line(name, 20)
        self.write_line(f"→ {describe_tool(name, arguments)}")

    def end_tool(self, call: ToolCall) -> None:
        if self.tools.pop(call.id, None) is None:  # it was not run
            self.write_line(f"→ {describe_tool(call.name, call.arguments)}")
        self.write_line(f"← {describe_result(call)}")

    def write_line(self, line: str) -> None:
        size = self.size
        self.text.write("" if not size or self.read(size - 1, size) == "\n" else "\n")
        self.text.write(f"{line}\n")

    def retry(self, chars: int | None) -> None:
        if chars is None:
            self.tools.clear()
            self.outcome, self.branches, chars = None, {}, self.size
        self.text.truncate(max(0, self.size - chars))

    def join(self, block: int, numbers: Collection[int]) -> None:
        """Mark branches as joined, also those that have ended but that the join leaves out of the text."""
        for key, branch in list(self.branches.items()):
            if key[0] == block and not branch.joined and (key[1] in numbers or branch.outcome):
                branch.joined, branch.position = True, self.size
                self.branches[key] = self.branches.pop(key)  # keeps `position` in ascending order

    def lines(
        self, console: Console, width: int, height: int, excluded: Collection[_SequenceView] = ()
    ) -> list[Text]:
        """Return its last `height` lines, with rows for its branches except `excluded`."""
        lines, end = list[Text](), self.size
        for branch in reversed(self.branches.values()):
            if branch not in excluded and len(lines) < height:
                after = self._wrapped(console, branch.position, end, width, height)
                lines, end = [*_rows(branch, width), *after, *lines], branch.position
        return [*self._wrapped(console, 0, end, width, height), *lines][-height:]

    def _wrapped(self, console: Console, start: int, end: int, width: int, height: int) -> list[Text]:
        """Return at least the last `height` lines of the text from `start` to `end`.

        It is read from a multiple of `width * height` on, so that lines stay wrapped as they were.
        """
        step = width * height
        text = printable(self.read(start + max(0, (end - start) // step - 1) * step, end)).strip()
        return list(Text(text).wrap(console, width)) if text else []


def _branch_grid(
    console: Console, branches: Sequence[_SequenceView], width: int, height: int
) -> tuple[Table, int]:
    """Arrange branches in panels, or in single lines if panels would be too low to read.

    Returns:
        The grid and its height.
    """
    max_columns = max(1, width // MIN_PANEL_WIDTH)
    rows = ceil(len(branches) / max_columns)
    columns, cell_height = ceil(len(branches) / rows), height // rows
    cells: list[RenderableType]
    if cell_height < 4 or width < MIN_PANEL_WIDTH:
        columns, cell_height = min(max_columns, ceil(len(branches) / max(1, height))), 1
        cells = [_row(branch, width // columns - 1) for branch in branches]
    else:
        inner_width = width // columns - 4
        texts = [branch.lines(console, inner_width, cell_height - 2) for branch in branches]
        cell_height = 2 + max(1, *map(len, texts))
        cells = [_panel(b, text, inner_width, cell_height) for b, text in zip(branches, texts, strict=True)]
    grid = Table.grid()
    for first in range(0, len(cells), columns):
        grid.add_row(*cells[first : first + columns])
    for column in grid.columns:
        column.width = width // columns
    return grid, cell_height * len(grid.rows)


def _panel(branch: _SequenceView, lines: Sequence[Text], inner_width: int, height: int) -> Panel:
    state, style = branch.state
    title, subtitle = (
        _single_line(text, inner_width - 2, s) for text, s in ((branch.name, "cyan"), (state, style))
    )
    return Panel(Text("\n").join(lines), title=title, subtitle=subtitle, border_style=style, height=height)


def _row(branch: _SequenceView, width: int) -> Text:
    """Return a branch in one line: its state, and the end of its text while it runs or the beginning once it ended."""
    state, style = branch.state
    name = _single_line(branch.name, min(width // 3, max(6, width - len(state) - 4)), "cyan")
    row = Text.assemble(name, "  ", (state, style), "  ", no_wrap=True)
    room = max(0, width - row.cell_len)
    start = 0 if branch.outcome else branch.size - room
    row.append_text(_single_line(branch.read(start, start + 2 * room), room))
    row.truncate(max(0, width), overflow="ellipsis")
    return row


def _rows(branch: _SequenceView, width: int) -> list[Text]:
    """Return the row of a branch and, while it runs, the rows of its own branches."""
    inner = () if branch.outcome else branch.branches.values()
    below = [Text("  ", no_wrap=True).append_text(row) for b in inner for row in _rows(b, width - 2)]
    return [_row(branch, width), *below]


def _single_line(text: str, width: int, style: str = "") -> Text:
    line = Text(" ".join(printable(text).split()), style, no_wrap=True)
    line.truncate(max(0, width), overflow="ellipsis")
    return line
