"""`ledger.jsonl`: what the guard has done to a run, and why, one JSON object a line.

The file tells one run, as the metrics do. Where an entry stands in it is a pair: how much data had been skipped,
and the step. After a roll-back the steps begin again from a smaller one, but with more data skipped, so the pairs
only ever increase; and when a run continues from a checkpoint, the entries beyond that checkpoint's pair are dropped,
and made anew when the run comes by there again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from bst_base.files import atomic_file
from bst_dist.report.metrics import keep_dropped, read_lines

FILE = "ledger.jsonl"
CHANGE = "change"
"""The action of an entry for settings that change from a step on."""
RESUMED = "resumed"
"""The action of an entry that says after which step a start went on that had no checkpoint of it."""


@dataclass(frozen=True)
class Entry:
    """One step that was not taken, a change of the run's settings after a step, or a start from local copies."""

    step: int
    """Its number, counted from 1 as in the metrics."""
    skipped: int
    """Steps' worth of data that had been skipped before."""
    cause: str
    """What was wrong, with its value and the limit."""
    action: str
    """stop, skip, roll-back, change or resumed."""
    back_to: int | None = None
    """After how many steps the run went on, when it was rolled back."""
    time: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), compare=False)

    @property
    def data_step(self) -> int:
        """Which step's worth of data it had, counted from 1: this clock does not go back with a roll-back."""
        return self.step + self.skipped


class Ledger:
    """The entries of a run, in order; the same on all ranks, and one of them writes them down."""

    def __init__(self, entries: Iterable[Entry] = (), path: Path | None = None) -> None:
        """`entries`: of the run so far; `path`: the file, on the rank that writes; other entries in it
        go to ledger.dropped.jsonl."""
        self.entries = list(entries)
        self._path = path
        if path is not None and path.exists():
            keep_dropped(path, [line for line in read_lines(path) if Entry(**line) not in self.entries])
            with atomic_file(path) as file:
                file.writelines(_line(entry) for entry in self.entries)

    def add(self, entry: Entry) -> None:
        """Append an entry; it is in the file when this returns."""
        self.entries.append(entry)
        if self._path is not None:
            with self._path.open("ab") as file:
                file.write(_line(entry))

    def lately(self, data_step: int, within: int) -> int:
        """How many entries there are of the last `within` steps' worth of data before `data_step`."""
        return sum(data_step - within <= entry.data_step < data_step for entry in self.entries
                   if entry.action not in (CHANGE, RESUMED))  # fmt: skip


def read(run_dir: Path, step: int, skipped: int) -> list[Entry]:
    """The entries of a run that continues after `step` steps with so many steps of data skipped."""
    entries = [Entry(**line) for line in read_lines(run_dir / FILE)]
    return [entry for entry in entries if (entry.skipped, entry.step) <= (skipped, step)]


def _line(entry: Entry) -> bytes:
    return json.dumps(asdict(entry)).encode() + b"\n"
