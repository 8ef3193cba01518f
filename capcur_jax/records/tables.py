"""Tables on a terminal or in a log. Cells are untrusted: they are shown as they are, without rich's markup."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.table import Table
from rich.text import Text

from capcur_jax.records.text import visible

_GAP = 2  # between columns
_NUMERIC = re.compile(r"[-+\d,.%() ]*[kMGTPE]?")  # "-" and "" stand where a number is missing


class _Whole(Table):
    """Narrows columns of several words first: rich narrows the widest ones and folds words that need not be."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        columns = [[str(cell) for cell in (column.header, *column.cells)] for column in self.columns]
        widths = [max(map(cell_len, column)) for column in columns]
        least = [max(map(cell_len, " ".join(column).split()), default=1) for column in columns]
        room = options.max_width - _GAP * (len(columns) - 1)
        if sum(widths) > room >= sum(least):
            while sum(widths) > room:
                widths[max(range(len(widths)), key=lambda i: (widths[i] > least[i], widths[i]))] -= 1
            for column, width in zip(self.columns, widths, strict=True):
                column.width = width
        yield from super().__rich_console__(console, options)


def table(head: Sequence[Any], rows: Iterable[Sequence[Any]]) -> Table:
    """A table whose columns are right-aligned where they hold numbers. Without any name in `head` it has no head."""
    made = _Whole(
        box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, show_header=any(head), padding=(0, 1, 0, 0)
    )  # fmt: skip
    cells = [[_cell(value) for value in row] for row in rows]
    for index, name in enumerate(head):
        numeric = bool(cells) and all(_NUMERIC.fullmatch(row[index].plain) for row in cells)
        made.add_column(_cell(name), justify="right" if numeric else "left", overflow="fold")
    for row in cells:
        made.add_row(*row)
    return made


def titled(title: str, head: Sequence[Any], rows: Iterable[Sequence[Any]]) -> Group:
    """`table` below its title and above an empty line. A title of rich's own would be folded to the table's width."""
    return Group(Text(visible(title), style="bold"), table(head, rows), "")


def pairs(values: Mapping[str, Any]) -> Table:
    """A row for each key and its value."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for key, value in values.items():
        grid.add_row(Text(f"  {visible(key)}"), _cell(value))
    return grid


def _cell(value: Any) -> Text:
    if isinstance(value, Text):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return Text(f"{value:,}")
    if isinstance(value, float):
        return Text(f"{value:.4g}")
    return Text(visible("" if value is None else str(value)))
