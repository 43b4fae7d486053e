"""Non-blocking standard output.

A terminal paused with Ctrl-S, a pipe whose reader sleeps, or a log on a hanging file system would block a process that
prints. The launching process must send heartbeats every second, so it must not block. Therefore a thread prints. Output
that it cannot write yet is buffered up to a limit. More is dropped, and a message says so once output works again.
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
"""Seconds that the program waits at its end while the output accepts nothing."""


class Printer:
    """Prints texts in a separate thread, in order."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[TextIO, str]] = deque()
        self._bytes, self._left_out, self._closed = 0, 0, False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="printing", daemon=True)
        self._thread.start()

    def put(self, stream: TextIO, text: str) -> None:
        """Queue `text` for printing; drop it when too much is already queued."""
        with self._changed:
            if self._bytes > KEPT_BYTES or self._left_out:
                self._left_out += text.count("\n")  # drop everything until the queue is empty, so that there is one gap
            else:
                self._waiting.append((stream, text))
                self._bytes += len(text)
            self._changed.notify_all()

    def close(self) -> None:
        """Wait until everything is printed, or until the output has accepted nothing for LAST_S."""
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
    """Write to the file descriptor, not through the stream's buffer.

    A thread that blocks in the buffer holds a lock that the interpreter needs when the program ends.
    """
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
    """A text stream that passes its text to a Printer."""

    def __init__(self, stream: TextIO, printer: Printer) -> None:
        self._stream, self._printer, self._begun = stream, printer, ""

    def write(self, text: str) -> int:
        """Queue complete lines, so that no line is dropped in part."""
        lines, newline, self._begun = (self._begun + text).rpartition("\n")
        if newline:
            self._printer.put(self._stream, lines + newline)
        return len(text)

    def flush(self) -> None:
        """Queue an incomplete line."""
        if self._begun:
            begun, self._begun = self._begun, ""
            self._printer.put(self._stream, begun)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def unhurried_output() -> Iterator[None]:
    """Make standard output and standard error non-blocking inside the context; also usable as a decorator."""
    before, printer = (sys.stdout, sys.stderr), Printer()
    for stream in before:
        with suppress(OSError):
            stream.flush()  # so that earlier output comes first
    sys.stdout, sys.stderr = (Queued(stream, printer) for stream in before)  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before
        printer.close()
