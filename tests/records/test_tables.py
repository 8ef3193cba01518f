"""Tables show their cells as they are, numbers to the right."""

import io

from rich.console import Console
from rich.text import Text

from capcur_jax.records import tables


def lines(*parts):
    console = Console(file=io.StringIO(), width=60, highlight=False)
    console.print(*parts)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def test_columns_of_numbers_go_to_the_right():
    rows = [("a", 1234567, 0.25, "-", "1.5 G", Text("75.0 +1.0"), "2 x"), ("b", None, 12.5, "-3.1%", "", "-", "")]
    head, rule, first, second = lines(tables.table(("name", "rows", "rate", "change", "FLOPs", "share", "mesh"), rows))
    assert head == "name       rows  rate  change  FLOPs      share  mesh"
    assert first == "a     1,234,567  0.25       -  1.5 G  75.0 +1.0  2 x"
    assert second == "b                12.5   -3.1%                 -"
    assert set(rule) == {"─"}


def test_cells_titles_and_keys_are_no_markup_and_hide_nothing():
    hostile = "[red]x\u202e\x1b[2J"
    shown = "[red]x\\u202e\\u001b[2J"
    title, *_, row, _ = lines(tables.titled(hostile, ("", ""), [(hostile, True)]))
    assert title == shown and row == f"{shown}  True"
    assert lines(tables.table((hostile,), []))[0] == shown
    assert lines(tables.pairs({hostile: hostile, "n": 1000})) == [f"  {shown}  {shown}", f"  n{' ' * 22}1,000"]


def test_a_table_without_names_has_no_head():
    assert lines(tables.titled("Rates", ("", ""), [("mean", "50.0%")])) == ["Rates", "mean  50.0%", ""]


def test_words_are_folded_only_where_nothing_else_helps():
    """The plan's stages in 80 columns."""
    head = ("stage", "data", "problems", "objective", "steps", "a step", "learning rate", "frozen")
    rows = [
        ("perception", "perception", 24000, "grpo", 150, "16 x 5", "0.0001", "nothing"),
        (
            "visual",
            "perception + text + visual (by difficulty)",
            24000,
            "grpo",
            200,
            "16 x 5",
            "0.0001",
            "all but LoRA's factors",
        ),
    ]
    console = Console(width=80, file=io.StringIO())
    console.print(tables.table(head, rows))
    shown = console.file.getvalue()
    words = {word for row in (head, *rows) for cell in row for word in str(cell).replace("24000", "24,000").split()}
    assert words <= set(shown.split()) and max(map(len, shown.splitlines())) <= 80
