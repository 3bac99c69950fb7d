"""A table that fits the width of the terminal: it leaves out its less important columns, and says which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from sgl_apr.views.printable import printable

MIN_SHRUNK = 12  # columns that are left of a column that is cut with an ellipsis
BORDER = 3  # columns that a cell takes in addition to its text


@dataclass(frozen=True)
class Column:
    """A column of a `FittedTable`.

    Attributes:
        name: The head.
        cells: The text of each row. It is shown as it is, never as markup.
        rank: Columns of the highest rank are left out first. Those of rank 0 always stay.
        shrinks: Whether long cells may be cut with an ellipsis. Such a column is aligned to the left.
        left: Whether it is aligned to the left in any case.
    """

    name: str
    cells: Sequence[str]
    rank: int = 0
    shrinks: bool = False
    left: bool = False

    @property
    def width(self) -> int:
        """The columns that the longest line needs."""
        lines = [line for cell in (self.name, *self.cells) for line in printable(cell).split("\n")]
        return max(map(cell_len, lines))

    @property
    def min_width(self) -> int:
        """The columns that it needs at least."""
        return min(self.width, max(cell_len(self.name), MIN_SHRUNK)) if self.shrinks else self.width


class FittedTable:
    """A table for `rich` with as many of its columns as fit. No number or name is cut, except in columns that shrink.

    Args:
        columns: The columns, all with the same number of cells.
        title: The title above the table.
        all_columns: Where a reader finds all columns, for the line that says which were left out.
    """

    def __init__(
        self, columns: Sequence[Column], title: str | None = None, all_columns: str = "a wider terminal"
    ) -> None:
        self._columns, self._title, self._all_columns = tuple(columns), title, all_columns

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        kept = fitting_columns(self._columns, options.max_width)
        # What the fixed columns leave, divided among those that shrink.
        shrinking = [column for column in kept if column.shrinks]
        room = options.max_width - 1 - sum(BORDER + (0 if c.shrinks else c.width) for c in kept)
        table = Table(title=Text(printable(self._title)) if self._title else None)
        for column in kept:
            width = max(column.min_width, room // len(shrinking)) if column.shrinks else column.width
            table.add_column(
                Text(column.name),
                justify="left" if column.shrinks or column.left else "right",
                no_wrap=True,
                overflow="ellipsis",
                width=min(column.width, width),
            )
        for row in zip(*(column.cells for column in kept), strict=True):
            table.add_row(*(Text(printable(cell)) for cell in row))
        yield table
        if left_out := [column.name for column in self._columns if column not in kept]:
            yield Text(f"Left out at this width: {', '.join(left_out)} ({self._all_columns} shows all)")


def fitting_columns(columns: Sequence[Column], width: int) -> list[Column]:
    """Return the columns that fit into a width, in their order. Those of rank 0 are kept in any case."""
    kept = list(columns)
    while 1 + sum(BORDER + column.min_width for column in kept) > width:
        # Of one rank, the last goes first.
        last = max(range(len(kept)), key=lambda k: (kept[k].rank, k))
        if kept[last].rank == 0:
            break
        del kept[last]
    return kept
