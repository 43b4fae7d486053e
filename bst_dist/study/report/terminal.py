"""Printing blocks of a document on the terminal, so that reports and commands share their texts and tables."""

from __future__ import annotations

from collections.abc import Iterable

from bst_base.terminal import Sheet, print_table, say
from bst_dist.study.report.document import Block, Heading, Items, Paragraph


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
