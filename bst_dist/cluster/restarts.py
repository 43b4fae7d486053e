"""Decides whether a failed run is restarted: as long as it makes progress."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path

from bst_base.errors import StorageError
from bst_base.json_lines import read_lines
from bst_dist.checkpoint.directory import committed, step_of
from bst_dist.cluster.verdict import Ended
from bst_dist.faults.status import UNREADABLE
from bst_dist.report.metrics import FILE

FIRST_WAIT_S, LONGEST_WAIT_S = 5.0, 60.0
"""Seconds to wait before the second restart without a new checkpoint; doubled with each further one, up to the longest.
After a file system error the wait is always the longest, because the file system may need minutes to recover."""


@dataclass
class Restarts:
    """Counts the restarts of one run."""

    run_dir: Path
    most: int
    """Maximum number of restarts in a row without a new checkpoint."""
    used: int = 0
    """Restarts since the last new checkpoint."""
    total: int = 0
    """All restarts of this launch."""

    def __post_init__(self) -> None:
        self._checkpoint = self._newest_checkpoint()
        self._failed_after: int | None = None
        self._storage_failed = False

    def refuse(self, ended: Ended, started: bool = True) -> str | None:
        """Return why a run that ended like this is not restarted; None means restart, and counts it.

        An empty string means that no restart is allowed or useful, so no reason is printed. Two failures after the
        same step, without a lost host or a file system error, probably come from the program or the data and would
        repeat. A new checkpoint resets the count, so old failures of a long run do not count. `started`: False when no
        host was fit for the last restart.
        """
        if self.most and ended.told and ended.failed:
            host, number = next(iter(ended.told.items()))
            return f"{host} was told to stop ({signal.Signals(number).name})"
        if not ended.worth_a_restart or not self.most:
            return ""
        if self._progressed():
            self.used = 0
        self._storage_failed = ended.status == UNREADABLE
        outside = ended.lost or ended.left_alone or self._storage_failed or not started
        step = None if outside else self._step()
        if step is not None and step == self._failed_after:
            return (
                f"failed twice after step {step} with all hosts available, so the cause is probably the program or "
                "the data; see the error above"
            )
        self._failed_after = step
        if self.used >= self.most:
            return f"{self.used} restarts without a new checkpoint (--max-restarts)"
        self.used, self.total = self.used + 1, self.total + 1
        return None

    @property
    def wait_s(self) -> float:
        """Seconds to wait before the next start: 0 at first, then longer each time, so that outside faults can end."""
        if self._storage_failed:
            return LONGEST_WAIT_S
        return 0.0 if self.used < 2 else min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** (self.used - 2))

    def _progressed(self) -> bool:
        """Whether there is a newer checkpoint than when the directory was last readable; False when it is not now."""
        newest = self._newest_checkpoint()
        if newest is None:
            return False
        before, self._checkpoint = self._checkpoint, newest
        return before is not None and newest > before

    def _newest_checkpoint(self) -> int | None:
        """Return the step of the newest checkpoint, 0 without one; None when this host cannot read the directory."""
        try:
            return max(map(step_of, committed(self.run_dir)), default=0)
        except StorageError:
            return None

    def _step(self) -> int | None:
        """Return the last step in the run's metrics; None when they cannot be read."""
        try:
            return max((line["step"] for line in read_lines(self.run_dir / FILE)), default=0)
        except (OSError, ValueError, KeyError):
            return None
