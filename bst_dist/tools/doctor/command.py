"""Check this machine: what training needs, what is missing, and how to get it.

    bst doctor
    bst doctor --json doctor.json

Marks: ✓ present; ! some runs would miss it, or something is unusual; ✗ missing, and every run needs it. `bst launch
--check` compares the hosts of a cluster with each other.

Exit status: 1 if something that every run needs is missing.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from bst_dist.tools.doctor import machine, ranks, software
from bst_dist.tools.doctor.finding import BROKEN, GOOD, LACKING, Finding, lacking

Check = Callable[[], Iterator[Finding]]

CHECKS: dict[str, Check] = {
    "python": software.python,
    "packages": software.packages,
    "project": software.project,
    "extras": software.extras,
    "accelerators": machine.accelerators,
    "machine": machine.processors,
    "shared memory": machine.shared_memory,
    "limits": machine.limits,
    "clock": machine.clock,
    "disk": machine.disk,
    "compilers": software.compilers,
    "kernels": software.operators,
    "launchers": machine.launchers,
    "MPI": machine.mpi,
    "ranks": ranks.collective,
}
LIMIT_S = 180.0
"""Time limit for all checks together. They run in parallel, and each has shorter limits of its own."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add nothing: the command has no arguments."""


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run all checks in parallel, and print their results in order, each as soon as those before it are done."""
    waiting = {name: _Waiting(name, check) for name, check in CHECKS.items()}
    deadline = time.monotonic() + LIMIT_S
    found = {}
    for name, check in waiting.items():
        found[name] = check.findings(deadline)
        for finding in found[name]:
            print(f"{finding.mark} {name:<14} {finding.text}", flush=True)
            if finding.remedy:
                print(f"{'':<17}→ {finding.remedy}", flush=True)
    marks = [finding.mark for findings in found.values() for finding in findings]
    counted = f"{marks.count(GOOD)} {GOOD}, {marks.count(LACKING)} {LACKING}, {marks.count(BROKEN)} {BROKEN}"
    ready = "this machine can train" if BROKEN not in marks else "this machine cannot train yet"
    print(f"{ready} ({counted})")
    listed = [{"check": name, **vars(finding)} for name, findings in found.items() for finding in findings]
    return {"passed": BROKEN not in marks, "findings": listed}


class _Waiting:
    """One running check, in its own thread, because a system call may never return if a file system is gone."""

    def __init__(self, name: str, check: Check) -> None:
        self._check, self._found = check, []
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def findings(self, deadline: float) -> list[Finding]:
        """Return the findings when the check is done, or at the deadline."""
        self._thread.join(max(0.0, deadline - time.monotonic()))
        late = [lacking("did not finish in time")] if self._thread.is_alive() else []
        return [*self._found, *late]

    def _run(self) -> None:
        try:
            for finding in self._check():
                self._found.append(finding)
        except Exception as error:  # one failed check must not end the report
            self._found.append(lacking(f"could not be checked: {type(error).__name__}: {error}"))
