"""Output of commands for people: lines and tables in one style."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from rich.box import SIMPLE
from rich.cells import cell_len
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

Cell = str | Text
"""The content of a table's cell: plain text, or text with a style."""


@dataclass(frozen=True)
class Sheet:
    """A table. Every row has a cell for each column."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    rule_after: int | None = None
    """On the terminal, print an empty line after this many rows."""
    flush_right: bool = False
    """Align all columns but the first to the right, also those with words among their numbers."""


def say(text: str, console: Console | None = None) -> None:
    """Print a line as it is; on `console` if that shows a live display."""
    (console or Console()).print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)


def is_numeric(cells: Sequence[Cell]) -> bool:
    """Whether a column consists of numbers, which are aligned to the right.

    A dash or dots count as a missing number.
    """
    told = [cell for cell in map(str, cells) if cell.strip("—–-…")]
    return bool(told) and all(cell.lstrip("+-−±(> ")[:1].isdigit() for cell in told)


def drawn(sheet: Sheet, title: str | None = None) -> Table:
    """Return the table for rich. The first column and numbers are never wrapped, and nothing is cut."""
    table = Table(box=SIMPLE, title=title)
    for place, name in enumerate(sheet.columns):
        cells = [row[place] for row in sheet.rows]
        numbers = is_numeric(cells)
        whole = place == 0 or numbers
        width = max((cell_len(str(cell)) for cell in cells), default=0) if whole else None
        right = numbers or (sheet.flush_right and place > 0)
        table.add_column(
            Text(name), justify="right" if right else "left", no_wrap=whole, min_width=width, overflow="fold"
        )
    for number, row in enumerate(sheet.rows, 1):
        cells = (cell if isinstance(cell, Text) else Text(cell) for cell in row)
        table.add_row(*cells, end_section=number == sheet.rule_after)
    return table


def print_table(sheet: Sheet, title: str | None = None, caption: str | None = None) -> None:
    """Print a table with numbers aligned to the right.

    It is as wide as the terminal, or wider if a number would be cut.
    """
    if title:
        say(title)
    console = Console() if sys.stdout.isatty() else Console(width=400)
    table = drawn(sheet)
    console.width = max(console.width, Measurement.get(console, console.options.update(width=10_000), table).minimum)
    console.print(table)
    if caption:
        say(caption)
