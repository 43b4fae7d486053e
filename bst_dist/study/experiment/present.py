"""Presentation of an experiment's table: on the terminal, and as a report with a figure."""

from __future__ import annotations

from pathlib import Path

from bst_base.terminal import Sheet
from bst_dist.study.experiment.figure import draw
from bst_dist.study.experiment.measure import Column
from bst_dist.study.experiment.readings import apart
from bst_dist.study.experiment.table import Row, Table
from bst_dist.study.report import document
from bst_dist.study.report.document import Block, Heading, Items, Paragraph, Picture
from bst_dist.study.statistics import mean


def blocks(table: Table) -> list[Block]:
    """Return the question, the table, and the notes for reading it."""
    return [Heading(1, table.experiment.question), sheet(table), Items(caption(table))]


def sheet(table: Table) -> Sheet:
    """Return the table: the levels, and below them the differences from the reference arm."""
    named = any(row.condition for row in table.rows)
    head = [*(["condition"] if named else []), "arm", "runs", "parameters", *(c.title for c in table.columns)]
    lines = []
    for row in table.rows:
        place = [row.condition] if named else []
        size = "" if row.parameters is None else f"{row.parameters:,}"
        cells = [_level(row, column) for column in table.columns]
        lines.append([*place, row.arm, f"{row.done} of {len(row.statuses)}", size, *cells])
    references = {row.condition: row for row in table.rows if row.arm == table.experiment.reference}
    for row in table.rows:
        if row.differences:
            place = [row.condition] if named else []
            cells = [_difference(row, references[row.condition], column) for column in table.columns]
            lines.append([*place, f"{row.arm} − {table.experiment.reference}", "", "", *cells])
    return Sheet(head, lines, rule_after=len(table.rows))


def caption(table: Table) -> list[str]:
    """Return the notes for reading the table: tokens, errors, the meaning of stars, and notes on single cells."""
    tokens = ", ".join(f"{number:,}" for number in sorted({row.tokens for row in table.rows}))
    lines = [f"Each run trained on {tokens} tokens. Standard errors are {table.over}."]
    if table.comparisons:
        lines.append(
            "* : the 95 % interval of the difference (Student's t) does not contain zero. Without any effect this "
            f"happens once in 20 comparisons; this table has {table.comparisons}."
        )
    if table.trained_with:
        lines.append(table.trained_with)
    return [*lines, *(f"† {note}" for note in table.notes), *table.unfinished]


def write_report(table: Table, directory: Path) -> list[Path]:
    """Write report.md, report.html and, if anything is measured, the figure. Return the files."""
    if (figure := draw(table)) is not None:
        bars = "Bars are standard errors over seeds; with one seed there are none."
        drawn: Block = Picture(table.experiment.name, figure, bars)
    else:
        drawn = Paragraph("No run is done yet: there is nothing to draw.")
    content = [*blocks(table), drawn]
    document.write(content, directory, title=table.experiment.question)
    return document.files(content, directory)


def _level(row: Row, column: Column) -> str:
    found = row.levels.get(column.key)
    if found is None:
        return "—"
    mark = " †" if column.key in row.notes else ""
    return f"{found.text(column.digits)}{mark}"


def _difference(row: Row, reference: Row, column: Column) -> str:
    """Return the cell of a difference; a percentage is of the reference's mean over the same seeds."""
    found = row.differences.get(column.key)
    if found is None:
        return ""
    mark = " *" if apart(found) else ""
    if not column.relative:
        return f"{found.text(column.digits, sign=True)}{mark}"
    whole = mean([value for seed, value in reference.values[column.key].items() if seed in row.paired[column.key]])
    error = "" if found.standard_error is None else f" ± {found.standard_error / whole.value:.0%}"
    return f"{found.value / whole.value:+.0%}{error}{mark}"
