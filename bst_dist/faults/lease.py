"""Who trains in a run directory: one start at a time, whoever launched it.

`lease/epoch-00000003.json` names the start that holds the directory. Each start makes the file of the next epoch, which
only one can do, and keeps a counter going in it. Another start looks who holds it: a process of this machine is asked
of the kernel, one of another machine is watched for `SILENCE_S`. While it lives the directory is refused; a dead one is
succeeded. A holder that was thought dead sees the next epoch before it commits a checkpoint, and ends.
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

from bst_base.errors import StorageError, UserError
from bst_base.files import sync_directory
from bst_dist.faults.ending import end

LEASE = "lease"
BEAT_S = 5.0
SILENCE_S = 30.0
"""How long the counter of another machine's start must stand still until that start counts as dead."""
JOBS = {"SLURM_JOB_ID": "Slurm job", "PBS_JOBID": "PBS job", "LSB_JOBID": "LSF job", "KUBERNETES_SERVICE_HOST": "pod"}


class Broadcast(Protocol):
    """As `Ranks`: who writes for all, and how the others learn of it."""

    first: bool

    def from_first(self, value: Any) -> Any:
        """Rank 0's value."""


class LeaseError(UserError):
    """Another start holds the run directory."""


class Lease:
    """This start's hold of a run directory; made by `acquire` on one rank, for all."""

    def __init__(self, path: Path, epoch: int, about: dict[str, Any], lost: Callable[[str], None] | None) -> None:
        self.path, self.epoch = path, epoch
        self._about, self._lost = about, lost
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()

    def require(self) -> None:
        """Raise LeaseError when another start has taken the directory over."""
        newest = max(_epochs(self.path.parent), default=0)
        if newest != self.epoch:
            taken = _read(_file(self.path.parent, newest)) if newest else {}
            raise LeaseError(
                f"{self.path.parent.parent}: taken over by {_holder(taken)} (epoch {newest}, this start has "
                f"{self.epoch}): this start ends and changes nothing more"
            )

    def release(self) -> None:
        """Let the next start have the directory at once."""
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
                continue  # the file system is in trouble; others take the silence for what it is

    def _write(self, **more: Any) -> None:
        # Not synced: a counter that a crash of the file server loses is one that stands still.
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps({**self._about, **more}))
        new.replace(self.path)


@dataclass(frozen=True)
class SharedLease:
    """The hold that rank 0 has for all ranks, as each of them knows it."""

    epoch: int
    lease: Lease | None = None
    """On rank 0."""

    def require(self) -> None:
        """On rank 0, as `Lease.require`."""
        if self.lease is not None:
            self.lease.require()


NO_LEASE = SharedLease(0)
"""Of what is written where nobody else writes."""


@contextmanager
def shared_lease(ranks: Broadcast, run_dir: Path) -> Iterator[SharedLease]:
    """Hold `run_dir` while the block runs; raises LeaseError or StorageError on all ranks when it cannot be had."""
    lease, refusal = None, None
    if ranks.first:
        try:
            lease = acquire(run_dir, _end)
        except OSError as error:
            refusal = StorageError.of(error, doing="write")
        except UserError as error:
            refusal = error
    epoch, refusal = ranks.from_first((lease and lease.epoch, refusal))
    if refusal is not None:
        raise refusal
    try:
        yield SharedLease(epoch, lease)
    finally:
        if lease is not None:
            lease.release()


def _end(why: str) -> None:
    """What this start computes is of no use any more, and what it writes would be in the way of another."""
    end(LeaseError.exit_status, f"bst train: {why}")


def acquire(run_dir: Path, lost: Callable[[str], None] | None = None, silence_s: float = SILENCE_S,
            say: Callable[[str], None] = print) -> Lease:  # fmt: skip
    """Hold `run_dir` for this start; raises LeaseError, naming the holder, when another start that lives does.

    `lost` is called, in a thread, with the reason when another start has taken the directory over.
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
    return {"host": socket.gethostname(), "pid": os.getpid(), "job": job, "machine": _machine(),
            "started": _started(os.getpid()), "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "beats": 0}  # fmt: skip


def _lives(folder: Path, epoch: int, before: Mapping[str, Any], silence_s: float) -> bool:
    """Whether the start that holds an epoch may still be at work."""
    if before.get("machine") and before["machine"] == _machine():
        return _started(before["pid"]) == before["started"]
    until = time.monotonic() + silence_s
    while time.monotonic() < until:
        time.sleep(min(1.0, silence_s / 4))
        if max(_epochs(folder), default=0) != epoch or _read(_file(folder, epoch)) != before:
            return not _read(_file(folder, epoch)).get("released")
    return False


def _machine() -> str | None:
    """What two processes have in common that can see each other's process ids."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return None


def _started(pid: int) -> str | None:
    """When a process of this machine was started; None when there is none, or it is only waited for."""
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
    """Empty while it is being written."""
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
