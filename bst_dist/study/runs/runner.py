"""The runner of a study: parallel training processes on this host, until no run is left to start.

Before each start the runner reads the status of the runs from their directories, and a run that is being trained is
locked. So the command may be killed at any time and started again. Several commands on a shared file system, as tasks
of a Slurm array or one per host, take runs from the same study without knowing of each other.
"""

from __future__ import annotations

import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from bst_base.errors import UserError
from bst_base.files import write_text
from bst_base.host import die_with_parent
from bst_base.settings import dump
from bst_dist.checkpoint.directory import committed
from bst_dist.cluster.processes import catch_stop_signals, signal_session
from bst_dist.config import load_recipe
from bst_dist.faults.lease import LEASE, LeaseError, acquire, in_use
from bst_dist.faults.status import RESUBMIT
from bst_dist.study.runs.recipes import Job
from bst_dist.study.runs.state import OUT_OF_MEMORY, FailedStart, State, Status
from bst_dist.train.rundir import RECIPE

POLL_S = 0.5
LOOK_S = 30.0
"""Mean time between two looks at runs that other commands may be training. A look asks the file system for several
files of each run, and an array of tasks has many commands, so that they look at random times."""
SAVING_S = 30.0
"""Time for all processes together to end after SIGTERM. A process that compiles does not react to the signal."""
MEMORY = ("OutOfMemoryError", "out of memory", "can't allocate memory", "Cannot allocate memory")


@dataclass
class Worker:
    """One training process."""

    run: Job
    process: subprocess.Popen[bytes]
    place: int
    """Index of the worker, from 0. It selects the worker's share of the host's accelerators."""
    log_bytes: int = 0
    """Size of its run's log before this start: the log of a run has the output of all its starts."""
    started: float = field(default_factory=time.monotonic)


class Runner:
    """Trains the runs of a study until each is done, failed or diverged."""

    def __init__(
        self,
        runs: Sequence[Job],
        state: State,
        workers: int,
        say: Callable[[str], None],
        per_device: int = 1,
        until: float = math.inf,
    ) -> None:
        """Prepare; `per_device`: workers that share a GPU; `until`: when to stop, in the time of `time.monotonic`."""
        self.runs, self.state, self.limit, self.say = runs, state, workers, say
        self.per_device, self.until = per_device, until
        self.workers: list[Worker] = []
        self.ended: set[str] = set()
        """Runs whose status (done, failed or diverged) is not read again."""
        self._left, self._next_look = True, 0.0

    def run(self, watch: Callable[[list[Worker]], None]) -> None:
        """Start runs until none is left, and call `watch` regularly. End them on a signal or when `until` is reached.

        Raises KeyboardInterrupt after a signal.
        """
        with catch_stop_signals() as stop_signals:
            try:
                while stop_signals.first is None and time.monotonic() < self.until:
                    self._collect()
                    self._fill()
                    watch(self.workers)
                    if not self.workers and not self._left:
                        return
                    time.sleep(POLL_S)
            finally:
                self._end()
        if stop_signals.first is not None:
            raise KeyboardInterrupt

    def _fill(self) -> None:
        """Start the runs that are ready, in the order of the plan, while workers are free.

        When workers stay free, the next look at the runs is after LOOK_S, or when a run of this command has ended.
        """
        if len(self.workers) == self.limit or time.monotonic() < self._next_look:
            return
        left = False
        for run, status in self._open():
            left = True  # another command trains it, or it waits for one that another command trains
            if status == "waiting" and self.state.ready(run):
                self._start(run)
            if len(self.workers) == self.limit:
                return
        self._left, self._next_look = left, time.monotonic() + LOOK_S * random.uniform(0.5, 1.5)

    def _start(self, run: Job) -> None:
        lock = self.state.lock(run.name)
        if lock is None:
            return
        try:
            if self.state.status_of(run).status == "done":  # another command finished it before the lock was taken
                return
            if (micro := self._prepared(run)) is None:
                return
            place = min(set(range(self.limit)) - {worker.place for worker in self.workers})
            log_file = self.state.path("logs", run.name)
            log_file.parent.mkdir(parents=True, exist_ok=True)
            with log_file.open("ab") as log:
                log_bytes = log.tell()
                process = subprocess.Popen(
                    self._command(run, micro),
                    env=self._environment(run, place),
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    pass_fds=(lock,),
                    start_new_session=True,
                    preexec_fn=partial(die_with_parent, signal.SIGTERM),
                )
            self.workers.append(Worker(run, process, place, log_bytes))
        finally:
            os.close(lock)  # the process has inherited the descriptor and holds the lock

    def _prepared(self, run: Job) -> int | None:
        """Write the recipe, empty a run directory that cannot be resumed, and return the micro-batch size.

        Returns None when another process trains the run. On a file system whose locks hold only on one host, only the
        lease of its directory says so.
        """
        directory = self.state.directory(run.name)
        try:
            lease = acquire(directory, say=self.say)
        except LeaseError:
            return None
        try:
            write_text(self.state.path("recipes", run.name), dump(run.recipe))
            micro = self._micro(run)
            if not committed(directory) and not self._same_micro(directory, micro):
                _empty(directory)  # it was killed before its recipe was written, or ran out of memory
            return micro
        finally:
            lease.release()  # the process that trains the run takes it itself

    def _micro(self, run: Job) -> int:
        """Return the recipe's micro-batch size, halved each time memory ran out, and at most that of its trunk."""
        micro = run.recipe.train.micro_sequences
        if run.trunk is not None:
            micro = load_recipe(self.state.directory(run.trunk) / RECIPE).train.micro_sequences
        short = [a.micro_sequences for a in self.state.failed_starts(run.name) if a.status == OUT_OF_MEMORY]
        return min([micro, *(used // 2 for used in short)])

    def _same_micro(self, directory: Path, micro: int) -> bool:
        path = directory / RECIPE
        return path.exists() and load_recipe(path).train.micro_sequences == micro

    def _command(self, run: Job, micro: int) -> list[str]:
        several = (run.recipe.ranks or 1) > 1
        # One rank needs no launcher, and without it starts in a third of the time.
        program = [sys.executable, "-m", *(("bst_dist", "train") if several else ("bst_dist.train",))]
        recipe = [str(self.state.path("recipes", run.name)), f"train.micro_sequences={micro}"]
        return [*program, *recipe, "--run-dir", str(self.state.directory(run.name)), "--resume"]

    def _environment(self, run: Job, place: int) -> dict[str, str]:
        """Return this process's environment with the worker's share of the cores and, for several workers, of the GPUs.

        A given OMP_NUM_THREADS is kept. Raises UserError if there are too few GPUs.
        """
        threads = str(max(1, len(os.sched_getaffinity(0)) // self.limit))
        found = {"OMP_NUM_THREADS": threads, **os.environ}
        devices = torch.cuda.device_count()
        if self.limit > 1 and devices:
            ranks = run.recipe.ranks or 1
            needed = -(-self.limit // self.per_device) * ranks
            if needed > devices:
                raise UserError(f"{self.limit} workers of {ranks} ranks need {needed} GPUs, here are {devices}")
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(devices)))).split(",")
            first = place // self.per_device * ranks
            found["CUDA_VISIBLE_DEVICES"] = ",".join(visible[first : first + ranks])
        return found

    def _collect(self) -> None:
        """Record and print how processes have ended since the last call."""
        for worker in [worker for worker in self.workers if worker.process.poll() is not None]:
            self.workers.remove(worker)
            self._next_look = 0.0  # it may be a trunk, or has to be started again
            name, seconds = worker.run.name, time.monotonic() - worker.started
            run_status = self.state.status_of(worker.run)
            stopped = worker.process.returncode == RESUBMIT  # another process's signal ended it, with a checkpoint
            if run_status.status not in ("done", "diverged") and not stopped and not self._refused(worker):
                self.state.record(name, self._failed_start(worker, seconds))
                run_status = self.state.status_of(worker.run)
            self.say(f"{run_status.status:>9} {name} after {seconds:.0f} s {run_status.reason}")

    def _refused(self, worker: Worker) -> bool:
        """Whether a process ended because another one was training its run; that is no failure of the run."""
        return worker.process.returncode == LeaseError.exit_status and in_use(self.state.directory(worker.run.name))

    def _failed_start(self, worker: Worker, seconds: float) -> FailedStart:
        """Return the record of a start that did not finish its run."""
        name, status = worker.run.name, worker.process.returncode
        lines = _tail(self.state.path("logs", name), worker.log_bytes)
        micro = self._micro(worker.run)
        ran_out = any(sign in line for line in lines for sign in MEMORY)
        # A run with a checkpoint did have enough memory, and a micro-batch of one sequence cannot be halved.
        smaller = ran_out and micro > 1 and not committed(self.state.directory(name))
        return FailedStart(
            status=OUT_OF_MEMORY if smaller else "failed",
            reason=lines[-1].strip() if lines else f"exit status {status}",
            exit_status=status,
            micro_sequences=micro,
            time_s=seconds,
        )

    def _open(self) -> Iterator[tuple[Job, Status]]:
        """Yield the runs that have not ended and that this command is not training, with their status."""
        running = {worker.run.name for worker in self.workers}
        for run in self.runs:
            if run.name in self.ended | running:
                continue
            status = self.state.status_of(run).status
            if status in ("done", "failed", "diverged"):
                self.ended.add(run.name)
            else:
                yield run, status

    def _end(self) -> None:
        """End the remaining processes. Steps after their last checkpoint are repeated at the next start."""
        for worker in self.workers:  # the process alone, as in `LocalRanks.terminate`
            worker.process.send_signal(signal.SIGTERM)
        latest = time.monotonic() + SAVING_S
        for worker in self.workers:
            try:
                worker.process.wait(timeout=max(0.0, latest - time.monotonic()))
            except subprocess.TimeoutExpired:
                signal_session(worker.process, signal.SIGKILL)
                worker.process.wait()


def _empty(directory: Path) -> None:
    """Remove all that a start has left in a run directory but its lease, which the caller holds."""
    for path in directory.iterdir():
        if path.is_dir() and path.name != LEASE:
            shutil.rmtree(path)
        elif path.name != LEASE:
            path.unlink()


def _tail(path: Path, start: int, most: int = 40) -> list[str]:
    """Return the last non-empty lines of a log, of what follows its first `start` bytes."""
    if not path.exists():
        return []
    lines = path.read_bytes()[start:][-20_000:].decode(errors="replace").splitlines()
    return [line for line in lines if line.strip()][-most:]
