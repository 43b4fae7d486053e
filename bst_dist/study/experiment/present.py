"""An experiment's table for people: on the terminal, and as a report with its figure."""

from __future__ import annotations

from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from bst_dist.study.experiment.figure import draw
from bst_dist.study.experiment.measure import Column
from bst_dist.study.experiment.statistics import Figure
from bst_dist.study.experiment.table import Row, Table
from bst_dist.study.report import document
from bst_dist.study.report.document import Block, Heading, Items, Paragraph, Picture, Sheet


def sheet(table: Table) -> Sheet:
    """Levels, and below them the differences from the reference arm."""
    named = any(row.condition for row in table.rows)
    head = [*(["condition"] if named else []), "arm", "runs", "parameters", *(c.title for c in table.columns)]
    lines = []
    for row in table.rows:
        place = [row.condition] if named else []
        size = "" if row.parameters is None else f"{row.parameters:,}"
        cells = [_cell(row.levels.get(column.key), column, row) for column in table.columns]
        lines.append([*place, row.arm, f"{row.done} of {len(row.standings)}", size, *cells])
    for row in table.rows:
        if row.differences:
            place = [row.condition] if named else []
            cells = [_difference(row, column) for column in table.columns]
            lines.append([*place, f"{row.arm} − {table.experiment.reference}", "", "", *cells])
    return Sheet(head, lines)


def caption(table: Table) -> list[str]:
    """What must be known to read the table: tokens, errors, stars, and what there is to say of single cells."""
    tokens = ", ".join(f"{number:,}" for number in sorted({row.tokens for row in table.rows}))
    lines = [f"Each run trained on {tokens} tokens. Standard errors are {table.over}."]
    if table.comparisons:
        lines.append(
            "* : the 95 % interval of a difference (Student's t) leaves out zero; so does one in twenty by chance, and "
            f"there are {table.comparisons}."
        )
    return [*lines, *(f"† {note}" for note in table.notes), *table.unfinished]


def show(table: Table) -> None:
    """Print the table; in a file or a pipe as wide as it needs to be."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=400)
    found = sheet(table)
    shown = RichTable(title=Text(table.experiment.question), title_justify="left", box=SIMPLE)
    named = found.columns[0] == "condition"
    for number, title in enumerate(found.columns):
        shown.add_column(Text(title), justify="left" if number <= named else "right", no_wrap=number <= named)
    for number, line in enumerate(found.rows):
        shown.add_row(*(Text(cell) for cell in line), end_section=number + 1 == len(table.rows))
    console.print(shown)
    for line in caption(table):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def write_report(table: Table, directory: Path) -> list[Path]:
    """Write report.md, report.html and the figure (where there is something to draw); returns the files."""
    blocks: list[Block] = [Heading(1, table.experiment.question), sheet(table), Items(caption(table))]
    if (figure := draw(table)) is not None:
        bars = "Bars are standard errors over seeds; with one seed there are none."
        blocks.append(Picture(table.experiment.name, figure, bars))
    else:
        blocks.append(Paragraph("No run is done yet: there is nothing to draw."))
    return document.write(blocks, directory, title=table.experiment.question)


def _cell(figure: Figure | None, column: Column, row: Row) -> str:
    if figure is None:
        return "—"
    mark = " †" if column.key in row.notes else ""
    error = "" if figure.standard_error is None else f" ± {_number(figure.standard_error, column)}"
    return f"{_number(figure.value, column)}{error}{mark}"


def _difference(row: Row, column: Column) -> str:
    figure = row.differences.get(column.key)
    if figure is None:
        return ""
    form, unit = f",.{column.digits}f", 1.0
    if column.relative:  # the reference's own value is what is left without the difference
        form, unit = ".0%", row.levels[column.key].value - figure.value
    error = "" if figure.standard_error is None else f" ± {figure.standard_error / unit:{form}}"
    return f"{figure.value / unit:+{form}}{error}{' *' if figure.apart else ''}"


def _number(value: float, column: Column) -> str:
    return f"{value:,.{column.digits}f}"
