"""Where each run of a study stands, as its directory says; nothing else is kept.

<root>/plan.json            what the budget has dropped
<root>/recipes/<run>.yaml   the recipe a run is started with
<root>/runs/<run>/          the run directory
<root>/attempts/<run>.jsonl how each start ended that did not finish: one JSON object a line
<root>/logs/<run>.log       what the run printed
<root>/documents/, lengths/ what evaluations of it gave, once they were asked for
<root>/locks/<run>          held by the process that is running it, on whatever host
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from bst_base.files import write_text
from bst_dist.report.metrics import FILE, read_lines
from bst_dist.study.runs.recipes import Job
from bst_dist.train.rundir import read_outcome

RUNS = "runs"
OUT_OF_MEMORY = "out of memory"
Status = Literal["done", "running", "waiting", "failed", "diverged"]
STATUSES: tuple[Status, ...] = get_args(Status)


@dataclass(frozen=True)
class Standing:
    """Where one run stands."""

    status: Status
    reason: str = ""


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """How a start ended that did not finish."""

    time: str = field(default_factory=_now)
    status: str
    """failed, or out of memory"""
    reason: str
    exit_status: int
    micro_sequences: int
    time_s: float


class State:
    """The directory of a study."""

    def __init__(self, root: Path, retries: int) -> None:
        self.root, self.retries = root, retries

    def directory(self, name: str) -> Path:
        """The run's directory."""
        return self.root / RUNS / name

    def path(self, kind: str, name: str) -> Path:
        """A file about a run: recipes, attempts, logs, locks, or an evaluation that is kept."""
        suffix = {"recipes": ".yaml", "attempts": ".jsonl", "logs": ".log", "locks": ""}.get(kind, ".json")
        return self.root / kind / f"{name}{suffix}"

    def standing(self, run: Job) -> Standing:
        """Where the run stands; a branch whose trunk cannot be had stands where the trunk does."""
        own = self._own(run.name)
        if own.status == "waiting" and run.trunk is not None:
            trunk = self._own(run.trunk)
            if trunk.status in ("failed", "diverged"):
                return Standing(trunk.status, f"its trunk: {trunk.reason}")
        return own

    def counts(self, runs: Iterable[Job]) -> Counter[str]:
        """How many runs stand where."""
        return Counter(self.standing(run).status for run in runs)

    def ready(self, run: Job) -> bool:
        """Whether what the run branches off is there."""
        return run.trunk is None or self._own(run.trunk).status == "done"

    def attempts(self, name: str) -> list[Attempt]:
        """How starts ended that did not finish, oldest first."""
        return [Attempt(**line) for line in read_lines(self.path("attempts", name))]

    def record(self, name: str, attempt: Attempt) -> None:
        """Add how a start ended."""
        path = self.path("attempts", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(attempt)) + "\n")

    def lock(self, name: str) -> int | None:
        """The run's lock as a file descriptor, or None when another process holds it.

        Held until every process that has the descriptor is gone, so a run outlives no sweep unseen.
        """
        path = self.path("locks", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return None
        return handle

    def progress(self, name: str) -> dict[str, Any] | None:
        """The last training step a run has reported."""
        lines = [line for line in read_lines(self.directory(name) / FILE) if line["kind"] == "train"]
        return lines[-1] if lines else None

    def kept(self, kind: str, name: str, make: Callable[[], Any]) -> Any:
        """What an evaluation of a finished run gave: made once, and read again after."""
        path = self.path(kind, name)
        if not path.exists():
            write_text(path, json.dumps(make()) + "\n")
        return json.loads(path.read_text(encoding="utf-8"))

    def _own(self, name: str) -> Standing:
        outcome = read_outcome(self.directory(name))
        if outcome and outcome["finished"]:
            return Standing("done")
        if outcome and outcome.get("diverged"):
            return Standing("diverged", outcome["diverged"])
        if self._locked(name):
            return Standing("running")
        failed = [attempt for attempt in self.attempts(name) if attempt.status == "failed"]
        if len(failed) > self.retries:
            return Standing("failed", failed[-1].reason)
        return Standing("waiting")

    def _locked(self, name: str) -> bool:
        """Whether a process holds the run's lock; looking at a run that was never started writes nothing."""
        if not self.path("locks", name).exists():
            return False
        handle = self.lock(name)
        if handle is not None:
            os.close(handle)
        return handle is None
