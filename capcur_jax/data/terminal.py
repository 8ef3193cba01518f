"""What the commands of `python -m capcur_jax.data` show on stderr: progress, tables, histograms."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from rich import box
from rich.console import Console, Group
from rich.progress import Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from capcur_jax.errors import InputError
from capcur_jax.evaluation.report_page import visible

_Item = TypeVar("_Item")
_BAR = 40  # characters of the longest bar


def console() -> Console:
    return Console(stderr=True, highlight=False)


def counted(items: Iterable[_Item], label: str) -> Iterator[_Item]:
    """Passes the items on; on a terminal a line counts them."""
    if not sys.stderr.isatty():
        yield from items
        return
    columns = (TextColumn("{task.description} {task.completed:,.0f}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=console(), transient=True) as progress:
        task = progress.add_task(label, total=None)
        for item in items:
            yield item
            progress.advance(task)


@contextlib.contextmanager
def files_explained() -> Iterator[None]:
    """A file that can't be opened or written ends the command with a line that names it."""
    try:
        yield
    except OSError as error:
        name = f"{error.filename}: " if error.filename else ""
        raise InputError(f"{name}{error.strerror or error}; mend that and start again") from None


def table(title: str, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> Group:
    """Untrusted cells are shown as they are, without rich's markup and without control characters."""
    made = Table(
        title=Text(title, style="bold"), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False,
        show_header=any(head),
    )  # fmt: skip
    rows = [[_cell(cell) for cell in row] for row in rows]
    for index, name in enumerate(head):
        numbers = all(row[index].plain.replace(",", "").replace(".", "").rstrip("%").isdigit() for row in rows)
        made.add_column(name, justify="right" if numbers and rows else "left", overflow="fold")
    for row in rows:
        made.add_row(*row)
    return Group(made, "")


def bars(title: str, histogram: Mapping[str, Sequence[float]]) -> Group:
    """A histogram ({"edges": n + 1 numbers, "counts": n}) as a table with a bar for each bin."""
    edges, counts = histogram["edges"], histogram["counts"]
    most = max([*counts, 1])
    rows = [
        (f"{low:,.4g} - {high:,.4g}", count, "█" * max(bool(count), round(_BAR * count / most)))
        for low, high, count in zip(edges, edges[1:], counts, strict=False)
    ]
    return table(title, ("", "rows", ""), rows)


def _cell(value: Any) -> Text:
    if isinstance(value, int) and not isinstance(value, bool):
        return Text(f"{value:,}")
    return Text(visible(str(value)))
