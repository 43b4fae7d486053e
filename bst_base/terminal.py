"""What commands print for people: lines and tables, in one style everywhere."""

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
"""What stands in a table: plain text, or text with a style."""


@dataclass(frozen=True)
class Sheet:
    """A table; every row has a cell for each column."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    rule_after: int | None = None
    """On the terminal, an empty line after that many rows."""
    flush_right: bool = False
    """All columns but the first, also those with words among their numbers."""


def say(text: str, console: Console | None = None) -> None:
    """A line for people, as it is; on `console` where something else is shown live."""
    (console or Console()).print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)


def is_numeric(cells: Sequence[Cell]) -> bool:
    """Whether a column is of numbers, which are flush right; a dash or dots stand for a number that is missing."""
    told = [cell for cell in map(str, cells) if cell.strip("—–-…")]
    return bool(told) and all(cell.lstrip("+-−±(> ")[:1].isdigit() for cell in told)


def drawn(sheet: Sheet, title: str | None = None) -> Table:
    """A table as rich draws it; the first column and numbers are never wrapped, nothing is cut."""
    table = Table(box=SIMPLE, title=title)
    for place, name in enumerate(sheet.columns):
        cells = [row[place] for row in sheet.rows]
        numbers = is_numeric(cells)
        whole = place == 0 or numbers
        width = max((cell_len(str(cell)) for cell in cells), default=0) if whole else None
        right = numbers or (sheet.flush_right and place > 0)
        table.add_column(Text(name), justify="right" if right else "left", no_wrap=whole, min_width=width,
                         overflow="fold")  # fmt: skip
    for number, row in enumerate(sheet.rows, 1):
        cells = (cell if isinstance(cell, Text) else Text(cell) for cell in row)
        table.add_row(*cells, end_section=number == sheet.rule_after)
    return table


def print_table(sheet: Sheet, title: str | None = None, caption: str | None = None) -> None:
    """A table, numbers flush right: as wide as the terminal, and where that would cut a number, as wide as it takes."""
    if title:
        say(title)
    console, table = Console() if sys.stdout.isatty() else Console(width=400), drawn(sheet)
    console.width = max(console.width, Measurement.get(console, console.options.update(width=10_000), table).minimum)
    console.print(table)
    if caption:
        say(caption)
