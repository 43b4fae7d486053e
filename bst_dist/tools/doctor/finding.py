"""What a check finds, and ways to find it out that always come back."""

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
"""For a process that has to import torch or DeepSpeed."""


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    mark: str
    """GOOD; LACKING: something that some runs need, or that is odd; BROKEN: something that every run needs."""
    text: str
    remedy: str = ""
    """How to get what is missing."""


def good(text: str) -> Finding:
    """All is well."""
    return Finding(GOOD, text)


def lacking(text: str, remedy: str = "") -> Finding:
    """Some runs would want it otherwise."""
    return Finding(LACKING, text, remedy)


def broken(text: str, remedy: str = "") -> Finding:
    """No run can do without it."""
    return Finding(BROKEN, text, remedy)


@dataclass(frozen=True)
class Answer:
    """What a process said before it ended, or before it was given up."""

    status: int | None
    """None: it did not end in time, or could not be started."""
    said: str

    @property
    def first_line(self) -> str:
        """The first line that is not empty."""
        return next((line.strip() for line in self.said.splitlines() if line.strip()), "")

    @property
    def last_line(self) -> str:
        """The last line that is not empty: of a traceback, what was wrong."""
        return next((line.strip() for line in reversed(self.said.splitlines()) if line.strip()), "")

    @property
    def version(self) -> str:
        """The first thing in it that looks like a version."""
        found = re.search(r"\d+(\.\d+)+\w*", self.said)
        return found[0] if found else ""


def ask(command: Sequence[str], patience_s: float = 10.0, environment: dict[str, str] | None = None) -> Answer:
    """Run a command and read what it says; a process that even SIGKILL does not end is left to itself."""
    with tempfile.TemporaryFile() as said:
        try:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=said,
                                       env={**os.environ, **(environment or {})}, start_new_session=True)  # fmt: skip
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
    """What a small program prints as JSON in its last line; raises RuntimeError when it fails, or says nothing."""
    answer = ask([sys.executable, "-c", program], patience_s, environment)
    if answer.status is None:
        raise RuntimeError(f"no answer within {patience_s:.0f} s")
    if answer.status != 0:
        raise RuntimeError(answer.last_line or f"ended with status {answer.status}")
    return json.loads(answer.last_line)
