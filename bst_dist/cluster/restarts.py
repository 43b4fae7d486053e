"""Whether a run that failed is started again: as long as it gets anywhere."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bst_dist.checkpoint.directory import committed, step_of
from bst_dist.cluster.verdict import Ended
from bst_dist.faults.status import UNREADABLE
from bst_dist.report.metrics import FILE, read_lines

FIRST_WAIT_S, LONGEST_WAIT_S = 5.0, 60.0
"""Before the second restart without a new checkpoint, doubled with each further one. The longest before every one after
an error of a file system, which may take minutes to come back."""


@dataclass
class Restarts:
    """Counts the restarts of one run."""

    run_dir: Path
    most: int
    """Restarts in a row without a new checkpoint."""
    used: int = 0
    """Of those."""
    total: int = 0
    """All restarts of this launch."""

    def __post_init__(self) -> None:
        self._checkpoint = self._newest_checkpoint()
        self._failed_after: int | None = None
        self._storage_failed = False

    def refuse(self, ended: Ended, started: bool = True) -> str | None:
        """Why a run that ended so is not started again; None counts a restart.

        Two failures after the same step, when neither a host was lost nor a file system failed, are of the program's or
        the data's making: they would come again. A new checkpoint gives all restarts back: what has failed in a month
        does not count against a run. `started`: whether there was a start since this was last asked, or no fit host.
        """
        if not ended.worth_a_restart or not self.most:
            return ""
        before, self._checkpoint = self._checkpoint, self._newest_checkpoint()
        if self._checkpoint > before:
            self.used = 0
        self._storage_failed = ended.status == UNREADABLE
        outside = ended.lost or ended.left_alone or self._storage_failed or not started
        step = None if outside else self._step()
        if step is not None and step == self._failed_after:
            return f"failed twice after step {step}: another restart would fail the same way"
        self._failed_after = step
        if self.used >= self.most:
            return f"{self.used} restarts without a new checkpoint (--max-restarts)"
        self.used, self.total = self.used + 1, self.total + 1
        return None

    @property
    def wait_s(self) -> float:
        """Before the next start: nothing at first, then longer each time, as something outside may have to mend."""
        if self._storage_failed:
            return LONGEST_WAIT_S
        return 0.0 if self.used < 2 else min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** (self.used - 2))

    def _newest_checkpoint(self) -> int:
        """The step of the newest one, 0 when none is to be seen."""
        try:
            return max(map(step_of, committed(self.run_dir)), default=0)
        except OSError:
            return 0

    def _step(self) -> int | None:
        """How far the run had come; None when that cannot be read."""
        try:
            return max((line["step"] for line in read_lines(self.run_dir / FILE)), default=0)
        except (OSError, ValueError, KeyError):
            return None
