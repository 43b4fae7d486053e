"""What commands print for people: lines and tables, in one style everywhere."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text


@dataclass(frozen=True)
class Sheet:
    """A table; every row has a cell for each column."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    rule_after: int | None = None
    """On the terminal, an empty line after that many rows."""


def say(text: str, console: Console | None = None) -> None:
    """A line for people, as it is; on `console` where something else is shown live."""
    (console or Console()).print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)


def is_numeric(cells: Sequence[str]) -> bool:
    """Whether a column is of numbers, which are flush right; a dash stands for a number that is missing."""
    told = [cell for cell in cells if cell.strip("—–-")]
    return bool(told) and all(cell.lstrip("+-−±(").strip()[:1].isdigit() for cell in told)


def print_table(sheet: Sheet, title: str | None = None, caption: str | None = None) -> None:
    """A table, numbers flush right: as wide as the terminal, and in a file or a pipe wide enough to cut no number."""
    shown = Table(box=SIMPLE)
    for place, name in enumerate(sheet.columns):
        right = is_numeric([row[place] for row in sheet.rows])
        shown.add_column(Text(name), justify="right" if right else "left", no_wrap=place == 0)
    for number, row in enumerate(sheet.rows, 1):
        shown.add_row(*(Text(cell) for cell in row), end_section=number == sheet.rule_after)
    if title:
        say(title)
    (Console() if sys.stdout.isatty() else Console(width=400)).print(shown)
    if caption:
        say(caption)
