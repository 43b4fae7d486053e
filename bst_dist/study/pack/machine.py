"""Train the runs of a packed folder on this machine; run.py starts it.

Takes the runs in the folder's order, several side by side on each GPU, until the minutes are over; then the active runs
write a checkpoint and stop. Results so far are written every minute and at the end.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bst_base.arguments import at_least
from bst_base.errors import UserError
from bst_base.stopping import INTERRUPTED
from bst_dist.checkpoint.directory import CHECKPOINTS
from bst_dist.study.pack import results
from bst_dist.study.pack.contents import SIDE_BY_SIDE, Pack, Packed, read_pack
from bst_dist.study.runs.runner import Runner, Worker
from bst_dist.study.runs.state import State
from bst_dist.study.sweep.collect import row_of
from bst_dist.version import versions

WRITE_EVERY_S = 60.0
END_S = 40.0
"""Seconds of the given time that are reserved for the last checkpoints and the results."""


def main(argv: list[str] | None = None) -> int:
    """Train for the given time; return the exit status."""
    args = arguments().parse_args(argv)
    try:
        return Machine(read_pack(args.folder), args).train()
    except UserError as error:
        print(f"run.sh: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        return INTERRUPTED


def arguments() -> argparse.ArgumentParser:
    """Return the parser of run.sh's arguments. run.py reads --state too, so it may not be abbreviated."""
    parser = argparse.ArgumentParser(prog="run.sh", description=__doc__, allow_abbrev=False)
    parser.add_argument("folder", type=Path, help=argparse.SUPPRESS)  # run.py gives it
    parser.add_argument(
        "--minutes", type=float, default=9.0, metavar="N", help="how long to train (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the results go (default: results/)")
    parser.add_argument(
        "--results", type=Path, metavar="DIR", help="results of another machine: skip the runs that it has finished"
    )
    parser.add_argument("--state", type=Path, metavar="DIR", help="where to keep runs and packages (default: state/)")
    parser.add_argument(
        "--side-by-side",
        type=at_least(1),
        default=SIDE_BY_SIDE,
        metavar="N",
        help="parallel runs per GPU, or on the CPU (default: %(default)s)",
    )
    return parser


class Machine:
    """One call of run.sh: it trains the runs of a folder for some minutes."""

    def __init__(self, pack: Pack, args: argparse.Namespace) -> None:
        self.began, self.pack = time.monotonic(), pack
        self.out = args.out or args.folder / "results"
        self.state = State(args.state / "study", pack.retries)
        self.jobs = pack.jobs(args.state / "data")
        self.until = self.began + max(END_S, args.minutes * 60 - END_S)
        self.side_by_side, self.written = args.side_by_side, self.began
        self.workers = self.side_by_side * max(1, torch.cuda.device_count())
        self.log: list[str] = []
        self.seen: dict[str, Packed] = {}
        """The runs that were started in this call, in this order."""
        self._tell(f"{pack.name} on {_device()}: {len(self.jobs)} runs, {args.minutes:g} minutes")
        if args.results:
            self._tell(f"{self._take_over(args.results)} runs were done elsewhere")

    def train(self) -> int:
        """Train until the time is over or no run is left; return exit status 0.

        Raises UserError if the first runs all fail (`_watch`).
        """
        before = self.state.counts(self.jobs)["done"]
        runner = Runner(self.jobs, self.state, self.workers, self._tell, per_device=self.side_by_side, until=self.until)
        try:
            runner.run(self._watch)
        finally:
            self._write()
        counts = self.state.counts(self.jobs)
        self._tell(f"{counts['done'] - before} runs done this time, {counts['done']} of {len(self.jobs)} in total")
        if remedy := self.state.remedy(self.jobs):
            self._tell(remedy)
        self._write()
        return 0

    def _take_over(self, folder: Path) -> int:
        """Take over finished runs from earlier results; return their number.

        Results do not contain weights, so a trunk is taken over only if all its branches are finished too, and after
        them: when this is interrupted, the next start takes over the rest.
        """
        there = State(self.state.root / "elsewhere", 0)
        shutil.rmtree(there.root, ignore_errors=True)
        results.restore(folder, there, {job.name for job in self.jobs}.__contains__)
        cells: dict[str, list[str]] = {}
        for job in self.jobs:
            cells.setdefault(job.trunk or job.name, []).append(job.name)
        mine, taken = self.state.directory, 0
        for trunk, names in cells.items():
            missing = [name for name in sorted(names, key=trunk.__eq__) if not mine(name).exists()]  # the trunk last
            done = [mine(name) for name in names if name not in missing] + [there.directory(name) for name in names]
            if trunk in missing and all(map(results.finished, done)):
                for name in missing:
                    mine(name).parent.mkdir(parents=True, exist_ok=True)
                    there.directory(name).replace(mine(name))
                taken += len(missing)
        shutil.rmtree(there.root, ignore_errors=True)
        return taken

    def _watch(self, workers: Sequence[Worker]) -> None:
        """Write the results every WRITE_EVERY_S seconds; raise UserError if the first runs have all failed.

        A run has failed when it is not started again: neither memory that ran out nor a first failure counts.
        """
        self.seen |= {worker.run.name: worker.run for worker in workers}
        if time.monotonic() - self.written > WRITE_EVERY_S:
            self._write()
        if any(results.finished(self.state.directory(name)) for name in self.seen):
            return
        statuses = [self.state.status_of(job) for job in self.seen.values()]
        failed = [run_status for run_status in statuses if run_status.status == "failed"]
        if len(failed) >= 2 * self.workers:
            raise UserError(
                f"the first {len(failed)} runs all failed, so the others are not tried: "
                f"{failed[-1].reason}\n{self.state.remedy(self.jobs)}"
            )

    def _write(self) -> None:
        """Write the results so far, and delete the checkpoints of finished runs that no other run needs."""
        self.written = time.monotonic()
        needed = self._needed_trunks()
        rows = [row_of(job.known, job, self.state) for job in self.jobs if job.known is not None]
        for job in self.jobs:
            if job.name not in needed and results.finished(self.state.directory(job.name)):
                shutil.rmtree(self.state.directory(job.name) / CHECKPOINTS, ignore_errors=True)
        log = "\n".join([*self.log, *self._failures()]) + "\n"
        results.write(self.out, rows, self.state, [job.name for job in self.jobs], self._summary(), log)

    def _needed_trunks(self) -> set[str]:
        """Return the names of the runs from which an unfinished run branches."""
        return {job.trunk for job in self.jobs if job.trunk and not results.finished(self.state.directory(job.name))}

    def _failures(self) -> list[str]:
        """Return the ends of the logs of runs that failed."""
        found = []
        for job in self.jobs:
            path = self.state.path("logs", job.name)
            if self.state.failed_starts(job.name) and path.exists():
                found += ["", f"--- {job.name}", path.read_bytes()[-5000:].decode(errors="replace")]
        return found

    def _summary(self) -> dict[str, Any]:
        return {
            "sweep": self.pack.name,
            "device": _device(),
            "host": platform.node(),
            "seconds": time.monotonic() - self.began,
            "side_by_side": self.side_by_side,
            "runs": dict(self.state.counts(self.jobs)),
            "versions": versions(),
            "packed_with": self.pack.versions,
        }

    def _tell(self, text: str) -> None:
        line = f"{time.monotonic() - self.began:7.1f} s  {text}"
        self.log.append(line)
        print(line, flush=True)


def _device() -> str:
    if not torch.cuda.is_available():
        return "a CPU"
    return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"


if __name__ == "__main__":
    sys.exit(main())
