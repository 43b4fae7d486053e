"""What limits the verdict of a sweep: runs that did not finish, and a learning rate that was not shown to be right."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from bst_dist.study.laws.audit import Corner
from bst_dist.study.report.document import Paragraph
from bst_dist.study.sweep.table import Row


def counted(rows: Sequence[Row]) -> str:
    """Return the number of planned measurements, and how many of them have each status."""
    counts = Counter(row.status for row in rows)
    return f"{len(rows)} measurements were planned: " + ", ".join(f"{n} {status}" for status, n in counts.items())


def caveats(rows: Sequence[Row], corners: Sequence[Corner]) -> Iterator[Paragraph]:
    """Yield the caveats; `corners` is the result of the audit."""
    if unfinished := sum(row.status in ("waiting", "running") for row in rows):
        yield Paragraph(
            f"{unfinished} measurements have not finished. A verdict read before they finish is wrong more "
            "often than its p-value says."
        )
    yield from _lost(rows)
    answers = Counter(corner.answer for corner in corners)
    if answers["failed"]:
        yield Paragraph(
            "The learning-rate audit failed, so a change with depth or compute may be an effect of the learning rate."
        )
    elif answers["undecided"]:
        yield Paragraph(
            "The learning-rate audit is undecided in some corners, so a change with depth or compute may "
            "be an effect of the learning rate."
        )
    elif not corners:
        yield Paragraph("There was no learning-rate audit: only the default learning rate was tried.")


def _lost(rows: Sequence[Row]) -> Iterator[Paragraph]:
    """Yield a sentence per architecture and arm about the runs of the grid that diverged or failed."""
    lost = Counter(
        (row.architecture, row.arm, row.status)
        for row in rows
        if row.role == "grid" and row.status in ("diverged", "failed")
    )
    for (architecture, arm, status), count in lost.items():
        runs, their = ("run", "its") if count == 1 else ("runs", "their")
        bias = f", which favours {architecture}" if status == "diverged" else ""
        yield Paragraph(f"{count} {runs} of {architecture} in arm {arm} {status}; {their} pairs are left out{bias}.")
