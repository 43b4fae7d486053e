"""Blocks of a document on the terminal: what a report says and what a command prints is made once."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bst_dist.study.report.document import Block, Heading, Items, Paragraph, Sheet, is_numeric


def say(text: str) -> None:
    """A line for people, as it is."""
    Console().print(text, markup=False, highlight=False, soft_wrap=True)


def show(blocks: Iterable[Block]) -> None:
    """Print headings, paragraphs, lists and tables; figures are left out."""
    for block in blocks:
        match block:
            case Heading(_, text):
                say(f"\n{text}")
            case Paragraph(text):
                say(text)
            case Items(lines):
                for line in lines:
                    say(f"  {line}")
            case Sheet():
                print_table(block)


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
