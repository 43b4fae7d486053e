"""A document of headings, paragraphs, tables and figures, written as Markdown and as one self-contained HTML file."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from bst_base.files import atomic_file, write_text
from bst_base.terminal import Sheet, is_numeric
from bst_dist.study.report.style import STYLE

KINDS = {"png": {"Software": None}, "pdf": {"CreationDate": None}}
"""Formats of a figure, with metadata: without the program's name and the date, equal data give equal files."""
CSS = """
body { font: 16px/1.5 Georgia, serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #111; }
h1, h2, h3 { line-height: 1.2; } table { border-collapse: collapse; font: 13px/1.4 monospace; margin: 1rem 0; }
th, td { padding: .15rem .6rem; text-align: left; border-bottom: 1px solid #ddd; }
th { border-bottom: 1px solid #111; } td.n, th.n { text-align: right; }
figure { margin: 1.5rem 0; } img { max-width: 100%; }
figcaption { font-size: 14px; color: #333; } .wide { overflow-x: auto; }
"""


@dataclass(frozen=True)
class Heading:
    level: int
    text: str


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Items:
    lines: Sequence[str]


@dataclass(frozen=True)
class Picture:
    """A figure; `name` is the name of its file without the suffix."""

    name: str
    figure: Figure
    caption: str


Block = Heading | Paragraph | Items | Sheet | Picture


def write(blocks: Sequence[Block], directory: Path, title: str) -> None:
    """Write report.md, report.html and figures/*.png and *.pdf: the `files`.

    The text comes first, so that it is there even if a figure cannot be written. The HTML file contains the figures.
    """
    (directory / "figures").mkdir(parents=True, exist_ok=True)
    write_text(directory / "report.md", "\n\n".join(_markdown(block) for block in blocks) + "\n")
    _write_figures(blocks, directory)
    body = "\n".join(_html(block, directory, blocks) for block in blocks)
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{CSS}</style>'
    page = f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n'
    write_text(directory / "report.html", page)


def files(blocks: Sequence[Block], directory: Path) -> list[Path]:
    """Return the files that `write` writes, the two reports first."""
    names = [block.name for block in blocks if isinstance(block, Picture)]
    figures = [directory / "figures" / f"{name}.{kind}" for name in names for kind in KINDS]
    return [directory / "report.md", directory / "report.html", *figures]


def _write_figures(blocks: Sequence[Block], directory: Path) -> None:
    with matplotlib.rc_context(STYLE):
        for picture in (block for block in blocks if isinstance(block, Picture)):
            for kind, metadata in KINDS.items():
                with atomic_file(directory / "figures" / f"{picture.name}.{kind}") as file:
                    picture.figure.savefig(file, format=kind, metadata=metadata)


def _markdown(block: Block) -> str:
    match block:
        case Heading(level, text):
            return f"{'#' * level} {text}"
        case Paragraph(text):
            return text
        case Items(lines):
            return "\n".join(f"- {line}" for line in lines)
        case Sheet(columns, rows, _):
            escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
            return "\n".join(f"| {' | '.join(row)} |" for row in [columns, ["---"] * len(columns), *escaped])
        case Picture(name, _, caption):
            return f"![{name}](figures/{name}.png)\n\n*{caption}*"


def _html(block: Block, directory: Path, blocks: Sequence[Block]) -> str:
    match block:
        case Heading(1, text):
            parts = [b for b in blocks if isinstance(b, Heading) and b.level == 2]
            links = "".join(f'<li><a href="#{_anchor(b)}">{html.escape(b.text)}</a></li>' for b in parts)
            return f"<h1>{html.escape(text)}</h1>" + (f"<nav><ul>{links}</ul></nav>" if len(parts) > 2 else "")
        case Heading(level, text):
            return f'<h{level} id="{_anchor(block)}">{html.escape(text)}</h{level}>'
        case Paragraph(text):
            return f"<p>{html.escape(text)}</p>"
        case Items(lines):
            return "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>"
        case Sheet(columns, rows, _):
            right = [is_numeric([row[place] for row in rows]) for place in range(len(columns))]
            head = _cells("th", columns, right)
            body = "".join(f"<tr>{_cells('td', row, right)}</tr>" for row in rows)
            return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'
        case Picture(name, _, caption):
            data = base64.b64encode((directory / "figures" / f"{name}.png").read_bytes()).decode()
            return (
                f'<figure><img alt="{name}" src="data:image/png;base64,{data}">'
                f"<figcaption>{html.escape(caption)}</figcaption></figure>"
            )


def _cells(tag: str, row: Sequence[str], right: Sequence[bool]) -> str:
    marks = (' class="n"' if number else "" for number in right)
    return "".join(f"<{tag}{mark}>{html.escape(cell)}</{tag}>" for cell, mark in zip(row, marks, strict=True))


def _anchor(heading: Heading) -> str:
    return "".join(c if c.isalnum() else "-" for c in heading.text.lower())
