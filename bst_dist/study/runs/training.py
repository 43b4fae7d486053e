"""Training the missing runs of a study, with a progress display: runs done and the estimated remaining time."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

from rich.console import Console
from rich.live import Live
from rich.table import Table

from bst_base.terminal import Sheet, drawn, say
from bst_dist.report.console import duration
from bst_dist.study.runs.recipes import Job
from bst_dist.study.runs.runner import Runner, Worker
from bst_dist.study.runs.state import State

REFRESH_S = 2.0


class Progress:
    """The share of a study's work that is done, and the remaining time."""

    def __init__(self, jobs: Sequence[Job], state: State) -> None:
        self.jobs, self.state = jobs, state
        self.started, self.before = time.monotonic(), self._done()

    def line(self) -> str:
        """Return a line for the terminal: k of n runs, and the time left at the average speed since the start."""
        done = sum(self.state.status_of(job).status == "done" for job in self.jobs)
        text = f"{done} of {len(self.jobs)} runs done"
        work, elapsed = self._done(), time.monotonic() - self.started
        left = sum(job.work for job in self.jobs) - work
        if work > self.before and left > 0:
            text += f", about {duration(left * elapsed / (work - self.before))} left"
        return text

    def _done(self) -> float:
        """Return the work of the finished runs and of the steps that running ones have taken."""
        total = 0.0
        for job in self.jobs:
            status = self.state.status_of(job).status
            if status == "done":
                total += job.work
            elif status == "running" and (line := self.state.progress(job.name)):
                total += job.work * (1 - (job.recipe.train.steps - line["step"]) / max(1, job.steps))
        return total


def train(name: str, jobs: Sequence[Job], state: State, workers: int) -> Counter[str]:
    """Train until no run is left to start; return the number of runs by status."""
    console, started, shown = Console(), time.monotonic(), 0.0
    progress = Progress(jobs, state)
    say(f"{name}: {state.counts(jobs)['done']} of {len(jobs)} runs are done")
    with Live(console=console, auto_refresh=False, transient=True) as live:

        def watch(running: list[Worker]) -> None:
            nonlocal shown
            if console.is_terminal and time.monotonic() - shown > REFRESH_S:
                live.update(running_table(f"{name}: {progress.line()}", running, state), refresh=True)
                shown = time.monotonic()

        def tell(text: str) -> None:
            say(f"{text} ({progress.line()})", console)

        Runner(jobs, state, workers, tell).run(watch)
    counts = state.counts(jobs)
    summary = ", ".join(f"{number} {status}" for status, number in counts.items())
    say(f"{name}: {summary} after {duration(time.monotonic() - started)}")
    if remedy := state.remedy(jobs):
        say(remedy)
    return counts


def missing(jobs: Sequence[Job], state: State) -> list[str]:
    """Return one line per run that `train` would train, without starting it."""
    found = []
    for job in jobs:
        run_status = state.status_of(job)
        if run_status.status != "done":
            after = f", after {job.trunk}" if job.trunk else ""
            found.append(f"{run_status.status:<9} {job.name}: {job.steps:,} steps{after}")
    return found


def running_table(title: str, running: Sequence[Worker], state: State) -> Table:
    """Return a table of the running workers."""
    rows = []
    for worker in running:
        line = state.progress(worker.run.name) or {"step": 0, "loss_nats": float("nan"), "tokens_per_s": 0.0}
        rows.append(
            [
                worker.run.name,
                f"{line['step']} / {worker.run.recipe.train.steps}",
                f"{line['loss_nats']:.4f}",
                f"{line['tokens_per_s']:,.0f}",
                duration(time.monotonic() - worker.started),
            ]
        )
    return drawn(Sheet(("run", "step", "loss", "tokens/s", "for"), rows), title)
