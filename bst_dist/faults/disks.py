"""Detects file systems that hang.

A read or write on a hanging file system (an unreachable file server, a frozen disk) never returns, and blocks its
thread. So each directory is tested by a separate thread, and only when there is a reason: when the rank makes no
progress, or after a further signal to stop.

A test that writes creates and removes a file. While the job makes no progress, one rank of each host writes, which is
enough to name the host, and the others only look at the directory: hundreds of ranks that write every second would
burden the server of a job that may only be slow. After a further signal each rank has to know for itself, and writes.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from bst_dist.parallel.devices import local_rank

EVERY_S = 1.0
STILL, TOLD_TO_STOP = "still", "told to stop"
"""Reasons to test directories: no progress, and a further signal to stop."""
SILENT_S = 10.0
"""Seconds without an answer after which a directory counts as hanging; a busy file server may take some seconds."""


class Disk:
    """Tests one directory in a thread."""

    def __init__(self, path: Path, attempt: Callable[[Path], object]) -> None:
        """`attempt`: an access to the directory, which may hang."""
        self.path, self._attempt = path, attempt
        self._since: float | None = None
        self._wanted = threading.Event()
        threading.Thread(target=self._run, name="disk", daemon=True).start()

    def watch(self, wanted: bool) -> None:
        """Start testing the directory every second, or stop testing."""
        self._wanted.set() if wanted else self._wanted.clear()

    @property
    def silent_s(self) -> float:
        """Seconds since the current attempt began; 0 when none is running."""
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
    """Tests the directories of a run."""

    def __init__(self) -> None:
        self._disks: dict[Path, Disk] = {}
        self._wanted: set[str] = set()
        self._first_of_host = not local_rank(os.environ)

    def add(self, written: Iterable[Path] = (), read: Iterable[Path] = ()) -> None:
        """Add directories that the run writes to, and others that it only reads from."""
        for paths, attempt in ((written, self._write), (read, os.stat)):
            for path in paths:
                if path not in self._disks:
                    self._disks[path] = Disk(path, attempt)
                    self._disks[path].watch(bool(self._wanted))

    def watch(self, why: str, wanted: bool = True) -> None:
        """Add the reason `why` to test the directories, or remove it; they are tested while there is a reason.

        Reasons are STILL and TOLD_TO_STOP.
        """
        self._wanted = self._wanted | {why} if wanted else self._wanted - {why}
        for disk in list(self._disks.values()):
            disk.watch(bool(self._wanted))

    def _write(self, folder: Path) -> None:
        if self._first_of_host or TOLD_TO_STOP in self._wanted:
            _write(folder)
        else:
            folder.stat()

    def silent(self, seconds: float = SILENT_S) -> dict[str, float]:
        """Return directory -> seconds without an answer, for those that have not answered for more than `seconds`."""
        found = {str(disk.path): disk.silent_s for disk in list(self._disks.values())}
        return {path: silent for path, silent in found.items() if silent > seconds}


def unanswering(silent: dict[str, float]) -> str:
    """Return the result of `Disks.silent` as text."""
    return ", ".join(f"{path} has not answered for {seconds:.0f} s" for path, seconds in silent.items())


def _write(folder: Path) -> None:
    """Write and remove an empty file, which the file system must process."""
    mark = folder / f".answers-{socket.gethostname()}-{os.getpid()}.partial"
    mark.write_bytes(b"")
    mark.unlink()
