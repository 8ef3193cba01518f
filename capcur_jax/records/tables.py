"""Tables on a terminal or in a log. Cells are untrusted: they are shown as they are, without rich's markup."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from capcur_jax.records.text import visible

_NUMERIC = re.compile(r"[-+\d,.%() ]*[kMGTPE]?")  # "-" and "" stand where a number is missing


def table(head: Sequence[Any], rows: Iterable[Sequence[Any]]) -> Table:
    """A table whose columns are right-aligned where they hold numbers. Without any name in `head` it has no head."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, show_header=any(head))
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
    grid.add_column(style="dim")
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
