"""Whether the file systems of a run answer.

A read or a write on one that hangs (a file server that is gone, a disk that is frozen) never returns, and the thread
that waits in it can do nothing else. So each directory is tried by a thread of its own, and only while there is reason
to: when the rank stands still, or has been told to stop.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

EVERY_S = 1.0
SILENT_S = 10.0
"""A directory that has not answered for so long hangs; a busy file server may take some seconds."""


class Disk:
    """One directory."""

    def __init__(self, path: Path, attempt: Callable[[Path], object]) -> None:
        self.path, self._attempt = path, attempt
        self._since: float | None = None
        self._wanted = threading.Event()
        threading.Thread(target=self._run, name="disk", daemon=True).start()

    def watch(self, wanted: bool) -> None:
        """Try it every second from now on, or no more."""
        self._wanted.set() if wanted else self._wanted.clear()

    @property
    def silent_s(self) -> float:
        """How long the attempt under way has taken."""
        since = self._since
        return 0.0 if since is None else time.monotonic() - since

    def _run(self) -> None:
        while self._wanted.wait():
            self._since = time.monotonic()
            with suppress(OSError):  # an error is an answer
                self._attempt(self.path)
            self._since = None
            time.sleep(EVERY_S)


class Disks:
    """The directories of a run."""

    def __init__(self) -> None:
        self._disks: dict[Path, Disk] = {}
        self._wanted: set[str] = set()

    def add(self, written: Iterable[Path] = (), read: Iterable[Path] = ()) -> None:
        """Have an eye on directories that the run writes to, and on others that it reads from."""
        for paths, attempt in ((written, _write), (read, os.stat)):
            for path in paths:
                if path not in self._disks:
                    self._disks[path] = Disk(path, attempt)
                    self._disks[path].watch(bool(self._wanted))

    def watch(self, why: str, wanted: bool = True) -> None:
        """Try them from now on, until nobody wants it any more."""
        self._wanted = self._wanted | {why} if wanted else self._wanted - {why}
        for disk in list(self._disks.values()):
            disk.watch(bool(self._wanted))

    def silent(self, seconds: float = SILENT_S) -> dict[str, float]:
        """Directories that have not answered for so long, and since how many seconds."""
        found = {str(disk.path): disk.silent_s for disk in list(self._disks.values())}
        return {path: silent for path, silent in found.items() if silent > seconds}


def unanswering(silent: dict[str, float]) -> str:
    """That in words."""
    return ", ".join(f"{path} has not answered for {seconds:.0f} s" for path, seconds in silent.items())


def _write(folder: Path) -> None:
    """A change that the file system must take in."""
    mark = folder / f".answers-{socket.gethostname()}-{os.getpid()}.partial"
    mark.write_bytes(b"")
    mark.unlink()
