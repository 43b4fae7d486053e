"""The status of each run of a study, read from the study's directory. There is no other state.

<root>/plan.json            blocks that were dropped to fit the budget
<root>/recipes/<run>.yaml   recipe that the run is started with
<root>/runs/<run>/          run directory
<root>/attempts/<run>.jsonl starts that did not finish the run, one JSON object per line; without it the run is new
<root>/logs/<run>.log       output of the run
<root>/documents/, lengths/ results of evaluations of the run, if any were requested
<root>/locks/<run>          lock file, held by the process that trains the run, on any host
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from bst_base.clock import utc_now
from bst_base.files import write_text
from bst_base.json_lines import read_lines
from bst_base.locks import flock
from bst_dist.report.metrics import FILE
from bst_dist.study.runs.recipes import Job
from bst_dist.train.rundir import OUTCOME, read_outcome

RUNS = "runs"
OUT_OF_MEMORY = "out of memory"
Status = Literal["done", "running", "waiting", "failed", "diverged"]
STATUSES: tuple[Status, ...] = get_args(Status)


@dataclass(frozen=True)
class RunStatus:
    """The status of one run, with the reason of a failure."""

    status: Status
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class FailedStart:
    """A start that did not finish its run."""

    time: str = field(default_factory=utc_now)
    status: str
    """"failed" or "out of memory"."""
    reason: str
    exit_status: int
    micro_sequences: int
    time_s: float


class State:
    """The directory of a study and the status of its runs."""

    def __init__(self, root: Path, retries: int) -> None:
        self.root, self.retries = root, retries

    def directory(self, name: str) -> Path:
        """Return the run directory."""
        return self.root / RUNS / name

    def path(self, kind: str, name: str) -> Path:
        """Return the path of a file about a run; `kind` is recipes, attempts, logs, locks or a kind of evaluation."""
        suffix = {"recipes": ".yaml", "attempts": ".jsonl", "logs": ".log", "locks": ""}.get(kind, ".json")
        return self.root / kind / f"{name}{suffix}"

    def status_of(self, run: Job) -> RunStatus:
        """Return the status of the run. A waiting branch has the status of its trunk if that failed or diverged."""
        own = self._own(run.name)
        if own.status == "waiting" and run.trunk is not None:
            trunk = self._own(run.trunk)
            if trunk.status in ("failed", "diverged"):
                return RunStatus(trunk.status, f"its trunk: {trunk.reason}")
        return own

    def counts(self, runs: Iterable[Job]) -> Counter[str]:
        """Return the number of runs by status."""
        return Counter(self.status_of(run).status for run in runs)

    def ready(self, run: Job) -> bool:
        """Whether the run's trunk, if it has one, is done."""
        return run.trunk is None or self._own(run.trunk).status == "done"

    def remedy(self, runs: Iterable[Job]) -> str:
        """Return how to have runs started again that failed too often; an empty string if there are none."""
        failed = [run.name for run in runs if self._own(run.name).status == "failed"]
        if not failed:
            return ""
        times = f"{self.retries + 1} time{'s' * (self.retries > 0)}"
        return (
            f"{len(failed)} of the runs failed {times} and will not be started again. To have one started again, "
            f"delete its list of failed starts: {self.path('attempts', failed[0])}"
        )

    def failed_starts(self, name: str) -> list[FailedStart]:
        """Return the starts that did not finish the run, oldest first."""
        return [FailedStart(**line) for line in read_lines(self.path("attempts", name))]

    def record(self, name: str, start: FailedStart) -> None:
        """Append a start that did not finish to the run's file of attempts."""
        path = self.path("attempts", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(start)) + "\n")

    def lock(self, name: str) -> int | None:
        """Take the run's lock. Return its file descriptor, or None if another process holds the lock.

        The lock is held until every process with the descriptor has ended. So a training process that survives its
        sweep command still holds it.
        """
        path = self.path("locks", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        return _locked(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), path)

    def progress(self, name: str) -> dict[str, Any] | None:
        """Return the metrics of the last training step that the run has reported; None before the first."""
        lines = [line for line in read_lines(self.directory(name) / FILE) if line["kind"] == "train"]
        return lines[-1] if lines else None

    def cached(self, kind: str, run: str, question: str, corpora: str, make: Callable[[], Any]) -> Any:
        """Return the result of an evaluation of a finished run: read from its file, or made with `make` and stored.

        The file's name has a hash of `corpora`, the SHA-256 of the text that the run was trained on, because a run of
        the same name may be trained once more after its corpus was prepared anew. Older files have no such hash; one
        is used if it is not older than the end of the run.
        """
        path = older = self.path(kind, f"{run}-{question}")
        if corpora:
            text = hashlib.sha256(corpora.encode()).hexdigest()[:8]
            path = self.path(kind, f"{run}-{question}-text-{text}")
        if not path.exists() and older.exists() and self._follows_the_end(older, run):
            path = older
        if not path.exists():
            write_text(path, json.dumps(make()) + "\n")
        return json.loads(path.read_text(encoding="utf-8"))

    def _follows_the_end(self, path: Path, run: str) -> bool:
        end = self.directory(run) / OUTCOME
        return not end.exists() or path.stat().st_mtime_ns >= end.stat().st_mtime_ns

    def _own(self, name: str) -> RunStatus:
        outcome = read_outcome(self.directory(name))
        if outcome and outcome["finished"]:
            return RunStatus("done")
        if outcome and outcome.get("diverged"):
            return RunStatus("diverged", outcome["diverged"])
        if self._locked(name):
            return RunStatus("running")
        failed = [start for start in self.failed_starts(name) if start.status == "failed"]
        if len(failed) > self.retries:
            return RunStatus("failed", failed[-1].reason)
        return RunStatus("waiting")

    def _locked(self, name: str) -> bool:
        """Whether a process holds the run's lock. Creates no lock file for a run that was never started."""
        path = self.path("locks", name)
        try:
            handle = _locked(os.open(path, os.O_RDWR), path)
        except FileNotFoundError:
            return False
        if handle is not None:
            os.close(handle)
        return handle is None


def _locked(handle: int, path: Path) -> int | None:
    """Lock an open file and return its descriptor; close it and return None if another process holds the lock."""
    held = False
    try:
        held = flock(handle, path)
    finally:
        if not held:
            os.close(handle)
    return handle if held else None
