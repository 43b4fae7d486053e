"""`ledger.jsonl`: the guard's actions on a run and other events, with their causes; one JSON object per line.

Like the metrics, the file describes one run without its repeated steps. Entries are ordered by a pair: the amount of
data skipped, and the step. After a roll-back the step is smaller but more data is skipped, so the pairs always
increase. When a run continues from a checkpoint, entries with a larger pair than the checkpoint's are dropped; the run
adds them again when it repeats those steps.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from bst_base.clock import utc_now
from bst_base.files import atomic_file, path_in_errors, sync_directory, sync_file
from bst_base.json_lines import keep_dropped, read_lines
from bst_dist.report import metrics

FILE = "ledger.jsonl"
CHANGE = "change"
"""Action of an entry for settings that change from a step on."""
RESUMED = "resumed"
"""Action of an entry for a start that resumed from local copies instead of a checkpoint."""


@dataclass(frozen=True)
class Entry:
    """A rejected step, a change of the run's settings after a step, or a resume from local copies."""

    step: int
    """The number of the step, counted from 1 as in the metrics."""
    skipped: int
    """Number of steps whose data had been skipped before."""
    cause: str
    """The reason; for a rejected step the value and the limit."""
    action: str
    """stop, skip, roll-back, change or resumed."""
    back_to: int | None = None
    """The step of the checkpoint that a roll-back continued from."""
    time: str = field(default_factory=utc_now, compare=False)

    @property
    def data_step(self) -> int:
        """The number of the step's data, counted from 1; unlike the step it does not decrease at a roll-back."""
        return self.step + self.skipped


class Ledger:
    """The entries of a run, in order. They are the same on all ranks; one rank writes them to the file."""

    def __init__(self, entries: Iterable[Entry] = (), path: Path | None = None, of_trunk: Iterable[Entry] = ()) -> None:
        """`entries`: of the run so far. `path`: the file, on the rank that writes it; other entries found in it are
        moved to ledger.dropped.jsonl. `of_trunk`: entries before the first step of a branch, which stay in the trunk's
        file."""
        self.entries, self._of_trunk = list(entries), list(of_trunk)
        self._path = path
        if path is not None and path.exists():
            keep_dropped(path, [line for line in read_lines(path) if Entry(**line) not in self.entries])
            with atomic_file(path) as file:
                file.writelines(_line(entry) for entry in self.entries)

    def add(self, entry: Entry) -> None:
        """Append an entry, and write it to the file before this returns."""
        self.entries.append(entry)
        if self._path is not None:
            new = not self._path.exists()
            with path_in_errors(self._path), self._path.open("ab") as file:
                file.write(_line(entry))
            if new:
                sync_directory(self._path.parent)

    def lately(self, data_step: int, within: int) -> int:
        """Return the number of rejected steps among the last `within` steps' data before `data_step`."""
        return sum(
            data_step - within <= entry.data_step < data_step
            for entry in [*self._of_trunk, *self.entries]
            if entry.action not in (CHANGE, RESUMED)
        )


def read(run_dir: Path, step: int, skipped: int) -> list[Entry]:
    """Read the entries that remain valid when a run continues after `step` steps with this much data skipped."""
    entries = [Entry(**line) for line in read_lines(run_dir / FILE)]
    return [entry for entry in entries if (entry.skipped, entry.step) <= (skipped, step)]


def sync(run_dir: Path) -> None:
    """Make the metrics and the ledger so far durable, before a checkpoint or local copies of their last step count.

    The guard decides from both files. If a crash took their last lines, a resumed run could decide otherwise.
    """
    for name in (metrics.FILE, FILE):
        if (run_dir / name).exists():
            sync_file(run_dir / name)


def _line(entry: Entry) -> bytes:
    return json.dumps(asdict(entry)).encode() + b"\n"
