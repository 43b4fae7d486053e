"""Standard output that a program never waits for.

A terminal stopped with Ctrl-S, a pipe whose reader sleeps or a log on a file system that hangs would stop whoever
prints; a process that has to be heard of by others every second must not be stopped by that. So a thread prints, and
what it does not get rid of is kept up to a limit and then left out, which is said as soon as there is somebody to say
it to.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

KEPT_BYTES = 4 << 20
LAST_S = 5.0
"""How long the end of a program waits for an output that takes nothing."""


class Printer:
    """Prints in a thread of its own what is given to it, in order."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[TextIO, str]] = deque()
        self._bytes, self._left_out, self._closed = 0, 0, False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="printing", daemon=True)
        self._thread.start()

    def put(self, stream: TextIO, text: str) -> None:
        """Have `text` printed; it is left out when too much waits already."""
        with self._changed:
            if self._bytes > KEPT_BYTES or self._left_out:
                self._left_out += text.count("\n")  # all that comes until everything kept is printed: one gap
            else:
                self._waiting.append((stream, text))
                self._bytes += len(text)
            self._changed.notify_all()

    def close(self) -> None:
        """Wait until all is printed, as long as the output takes something within LAST_S."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            before = -1
            while self._bytes and self._bytes != before:
                before = self._bytes
                self._changed.wait(LAST_S)

    def _run(self) -> None:
        while (next_one := self._next()) is not None:
            stream, text = next_one
            _write(stream, text)
            with self._changed:
                self._bytes -= len(text)
                self._changed.notify_all()

    def _next(self) -> tuple[TextIO, str] | None:
        with self._changed:
            while not self._waiting:
                if self._left_out:
                    count, self._left_out = self._left_out, 0
                    return sys.__stderr__, self._count(f"[{count} lines left out: the output was not read]\n")
                if self._closed:
                    return None
                self._changed.wait()
            return self._waiting.popleft()

    def _count(self, text: str) -> str:
        self._bytes += len(text)
        return text


def _write(stream: TextIO, text: str) -> None:
    """Past the stream's own buffer: whoever waits in that holds a lock that the end of the program wants."""
    with suppress(OSError, ValueError):
        try:
            number = stream.fileno()
        except (OSError, AttributeError):  # a stream in memory
            stream.write(text)
            return
        data = text.encode(getattr(stream, "encoding", None) or "utf-8", errors="replace")
        while data:
            data = data[os.write(number, data) :]


class Queued:
    """A text stream whose text a printer prints."""

    def __init__(self, stream: TextIO, printer: Printer) -> None:
        self._stream, self._printer, self._begun = stream, printer, ""

    def write(self, text: str) -> int:
        """Have whole lines printed: none is left out in part."""
        lines, newline, self._begun = (self._begun + text).rpartition("\n")
        if newline:
            self._printer.put(self._stream, lines + newline)
        return len(text)

    def flush(self) -> None:
        """Have a line printed that is not at its end yet."""
        if self._begun:
            begun, self._begun = self._begun, ""
            self._printer.put(self._stream, begun)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def unhurried_output() -> Iterator[None]:
    """Standard output and error are such streams while the block runs; also a decorator."""
    before, printer = (sys.stdout, sys.stderr), Printer()
    for stream in before:
        with suppress(OSError):
            stream.flush()  # what was printed before comes first
    sys.stdout, sys.stderr = (Queued(stream, printer) for stream in before)  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before
        printer.close()
