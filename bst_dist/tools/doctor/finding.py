"""The findings of a check, and functions that run a program with a time limit."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

GOOD, LACKING, BROKEN = "✓", "!", "✗"
PATIENCE_S = 60.0
"""Time limit for a process that imports torch or DeepSpeed."""


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    mark: str
    """GOOD; LACKING: some runs need it, or it is unusual; BROKEN: every run needs it."""
    text: str
    remedy: str = ""
    """How to get what is missing."""


def good(text: str) -> Finding:
    """Return a finding that needs no action."""
    return Finding(GOOD, text)


def lacking(text: str, remedy: str = "") -> Finding:
    """Return a finding about something that only some runs need, or that is unusual."""
    return Finding(LACKING, text, remedy)


def broken(text: str, remedy: str = "") -> Finding:
    """Return a finding about something missing that every run needs."""
    return Finding(BROKEN, text, remedy)


@dataclass(frozen=True)
class Answer:
    """Exit status and output (stdout and stderr) of a process that ended or timed out."""

    status: int | None
    """Exit status; None if the process did not end in time, or could not be started."""
    said: str

    @property
    def first_line(self) -> str:
        """The first line that is not empty."""
        return next((line.strip() for line in self.said.splitlines() if line.strip()), "")

    @property
    def last_line(self) -> str:
        """The last line that is not empty: the error message, if the output is a traceback."""
        return next((line.strip() for line in reversed(self.said.splitlines()) if line.strip()), "")

    @property
    def version(self) -> str:
        """The first text in the output that looks like a version."""
        found = re.search(r"\d+(\.\d+)+\w*", self.said)
        return found[0] if found else ""


def ask(command: Sequence[str], patience_s: float = 10.0, environment: dict[str, str] | None = None) -> Answer:
    """Run a command and return its output.

    After `patience_s` seconds the process group is killed. If even SIGKILL does not end it, it is not waited for.
    """
    with tempfile.TemporaryFile() as said:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
            )
        except OSError as error:
            return Answer(None, str(error))
        status: int | None = None
        try:
            status = process.wait(patience_s)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):
                process.wait(2.0)
        said.seek(0)
        return Answer(status, said.read().decode(errors="replace"))


def ask_python(program: str, patience_s: float = PATIENCE_S, environment: dict[str, str] | None = None) -> Any:
    """Run a small Python program, and return the JSON value that it prints in its last line.

    Raise RuntimeError if it fails or does not end in time.
    """
    answer = ask([sys.executable, "-c", program], patience_s, environment)
    if answer.status is None:
        raise RuntimeError(f"no answer within {patience_s:.0f} s")
    if answer.status != 0:
        raise RuntimeError(answer.last_line or f"ended with status {answer.status}")
    return json.loads(answer.last_line)
