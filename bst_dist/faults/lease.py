"""The lease on a run directory: only one start at a time may train in it.

`lease/epoch-00000003.json` describes the start that holds the lease. Each start creates the file of the next epoch,
which only one start can do, and increments a counter in it. A new start checks whether the holder is alive: it looks up
a process on this machine, and watches the counter of one on another machine for `SILENCE_S`. A living holder keeps the
lease, and the new start is refused. A dead holder is replaced. If a holder was alive after all, it sees the next epoch
before it commits a checkpoint, and ends.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from bst_base.clock import utc_now
from bst_base.errors import StorageError, UserError
from bst_base.files import sync_directory
from bst_dist.faults.ending import end

LEASE = "lease"
BEAT_S = 5.0
SILENCE_S = 30.0
"""Seconds without a change of the counter until a start on another machine counts as dead."""
JOBS = {"SLURM_JOB_ID": "Slurm job", "PBS_JOBID": "PBS job", "LSB_JOBID": "LSF job", "KUBERNETES_SERVICE_HOST": "pod"}


class Broadcast(Protocol):
    """The part of `Ranks` that is needed here: whether this is rank 0, and a broadcast from rank 0."""

    first: bool

    def broadcast_object(self, value: Any) -> Any:
        """Return rank 0's value on every rank."""


class LeaseError(UserError):
    """Another start holds the run directory."""


class Lease:
    """This start's lease on a run directory; created by `acquire` on one rank for all ranks."""

    def __init__(self, path: Path, epoch: int, about: dict[str, Any], lost: Callable[[str], None] | None) -> None:
        self.path, self.epoch = path, epoch
        self._about, self._lost = about, lost
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()

    def require(self) -> None:
        """Raise LeaseError when another start has taken over the directory, StorageError when this lease is missing."""
        newest = max(_epochs(self.path.parent), default=0)
        if newest > self.epoch:
            raise LeaseError(
                f"{self.path.parent.parent}: taken over by {_holder(_read(_file(self.path.parent, newest)))} (epoch "
                f"{newest}, this start has {self.epoch}): this start ends and changes nothing more"
            )
        if newest < self.epoch:
            raise StorageError(f"{self.path}: this start's lease is not there: is the file system still mounted?")

    def release(self) -> None:
        """Release the lease, so that the next start does not wait."""
        self._closed.set()
        self._thread.join(BEAT_S)
        with suppress(OSError, UserError):
            self.require()
            self._write(released=True)

    def _keep(self) -> None:
        beats = 0
        while not self._closed.wait(BEAT_S):
            beats += 1
            try:
                self.require()
                self._write(beats=beats)
            except LeaseError as error:
                if self._lost is not None:
                    self._lost(str(error))
                return
            except (OSError, StorageError):
                continue  # a file system error: try again; if it lasts, another start may take over

    def _write(self, **more: Any) -> None:
        # Not synced: if a crash of the file server loses an update, the counter only stands still.
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps({**self._about, **more}))
        new.replace(self.path)


@dataclass(frozen=True)
class SharedLease:
    """The lease that rank 0 holds for all ranks, as seen by each rank."""

    epoch: int
    lease: Lease | None = None
    """The lease on rank 0; None on other ranks."""

    def require(self) -> None:
        """On rank 0 do `Lease.require`; on other ranks do nothing."""
        if self.lease is not None:
            self.lease.require()


NO_LEASE = SharedLease(0)
"""For directories that no other start can write to."""


@contextmanager
def shared_lease(ranks: Broadcast, run_dir: Path) -> Iterator[SharedLease]:
    """Hold the lease on `run_dir` inside the context.

    Raises LeaseError or StorageError on all ranks when the lease cannot be acquired.
    """
    lease, refusal = None, None
    if ranks.first:
        try:
            lease = acquire(run_dir, _end)
        except OSError as error:
            refusal = StorageError.of(error, doing="write")
        except UserError as error:
            refusal = error
    epoch, refusal = ranks.broadcast_object((lease and lease.epoch, refusal))
    if refusal is not None:
        raise refusal
    try:
        yield SharedLease(epoch, lease)
    finally:
        if lease is not None:
            lease.release()


def _end(why: str) -> None:
    """End this process: another start has taken over, and further writes would disturb it."""
    end(LeaseError.exit_status, f"bst train: {why}")


def acquire(
    run_dir: Path,
    lost: Callable[[str], None] | None = None,
    silence_s: float = SILENCE_S,
    say: Callable[[str], None] = print,
) -> Lease:
    """Acquire the lease on `run_dir`; raises LeaseError, naming the holder, when another living start holds it.

    `lost`: called in a thread with the reason when another start has taken over the directory. `silence_s`: how long to
    watch the counter of a holder on another machine.
    """
    folder = run_dir / LEASE
    folder.mkdir(parents=True, exist_ok=True)
    epoch = max(_epochs(folder), default=0)
    if epoch:
        before = _read(_file(folder, epoch))
        if not before.get("released"):
            if _lives(folder, epoch, before, silence_s):
                raise LeaseError(_in_use(run_dir, epoch, before))
            ended = f"{_holder(before)} is no longer running"
            say(f"{run_dir}: {ended}: this start takes over the run directory (epoch {epoch + 1})")
    return _take(run_dir, epoch + 1, lost)


def is_held(run_dir: Path) -> bool:
    """Whether a start holds the lease and has written it within `SILENCE_S`; unlike `acquire`, this does not wait.

    False also when the directory cannot be read.
    """
    folder = run_dir / LEASE
    try:
        path = _file(folder, max(_epochs(folder), default=0))
        with path.open("rb") as file:  # opened first: a network file system may otherwise return a cached time
            recent = time.time() - os.fstat(file.fileno()).st_mtime < SILENCE_S
        return recent and not _read(path).get("released")
    except (OSError, StorageError):
        return False


def in_use(run_dir: Path, silence_s: float = SILENCE_S) -> bool:
    """Whether a start that may still be running holds the lease on `run_dir`; unlike `is_held`, this waits.

    `silence_s`: as in `acquire`.
    """
    folder = run_dir / LEASE
    epoch = max(_epochs(folder), default=0)
    before = _read(_file(folder, epoch))
    return bool(epoch) and not before.get("released") and _lives(folder, epoch, before, silence_s)


def _take(run_dir: Path, epoch: int, lost: Callable[[str], None] | None) -> Lease:
    path = _file(run_dir / LEASE, epoch)
    about = _about(os.environ)
    try:
        with path.open("x", encoding="utf-8") as file:
            json.dump(about, file)
    except FileExistsError:
        raise LeaseError(_in_use(run_dir, epoch, _read(path))) from None
    sync_directory(path.parent)
    for older in _epochs(path.parent):
        if older < epoch:
            _file(path.parent, older).unlink(missing_ok=True)
    return Lease(path, epoch, about, lost)


def _about(environ: Mapping[str, str]) -> dict[str, Any]:
    job = next((f"{kind} {environ[name]}" for name, kind in JOBS.items() if environ.get(name)), None)
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "job": job,
        "machine": _machine(),
        "started": _started(os.getpid()),
        "time": utc_now(),
        "beats": 0,
    }


def _lives(folder: Path, epoch: int, before: Mapping[str, Any], silence_s: float) -> bool:
    """Whether the start that holds an epoch may still be running."""
    if before.get("machine") and before["machine"] == _machine():
        return _started(before["pid"]) == before["started"]
    until = time.monotonic() + silence_s
    while time.monotonic() < until:
        time.sleep(min(1.0, silence_s / 4))
        if max(_epochs(folder), default=0) != epoch or _read(_file(folder, epoch)) != before:
            return not _read(_file(folder, epoch)).get("released")
    return False


def _machine() -> str | None:
    """Return an id that is equal for processes that see each other's process ids (same boot, same PID namespace)."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return None


def _started(pid: int) -> str | None:
    """Return the start time of a process on this machine; None when it does not exist or is a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _epochs(folder: Path) -> list[int]:
    try:
        names = [path.name for path in folder.iterdir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StorageError.of(error, folder) from None
    return [int(name[6:-5]) for name in names if name.startswith("epoch-") and name.endswith(".json")]


def _file(folder: Path, epoch: int) -> Path:
    return folder / f"epoch-{epoch:08d}.json"


def _read(path: Path) -> dict[str, Any]:
    """Read an epoch file; return an empty dictionary when it is missing or not yet fully written."""
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    except OSError as error:
        raise StorageError.of(error, path) from None


def _holder(about: Mapping[str, Any]) -> str:
    if not about:
        return "a start that has just begun"
    job = f"{about['job']}, " if about.get("job") else ""
    return f"process {about['pid']} on {about['host']} ({job}since {about['time']})"


def _in_use(run_dir: Path, epoch: int, about: Mapping[str, Any]) -> str:
    return (
        f"{run_dir}: {_holder(about)} trains there (epoch {epoch}): wait until it ends, stop it, or choose another "
        "--run-dir"
    )
