"""The ranks of a job on one host: started with their rendezvous, watched, and ended together.

`bst train` runs them itself; on a cluster an agent on every host does. DeepSpeed's own `launch` is not between: it
turns every signal into status 1 and gives one rank after the other 30 seconds, where a checkpoint needs all at once.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from bst_base.host import die_with_parent
from bst_dist.faults.signals import FurtherCtrlC, stopping

SAME_KEY_S = 0.5
"""A further SIGINT within this time is from the same stroke of Ctrl-C, or another copy of the first notice."""
KILLED_S = 10.0
"""How long the kernel may take to end what was killed."""


@dataclass(frozen=True)
class Share:
    """One host's part of a job's ranks, and where they all meet."""

    first: int
    """Lowest rank on the host; the others follow it."""
    count: int
    world: int
    address: str
    """Of rank 0's host."""
    port: int

    def environment(self, rank: int) -> dict[str, str]:
        """What `torch.distributed` and DeepSpeed read: the one place where it is set."""
        return {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank - self.first),
            "WORLD_SIZE": str(self.world),
            "LOCAL_WORLD_SIZE": str(self.count),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
        }


class LocalRanks:
    """The processes of a share: each leads a session of its own and dies with the process that made this object."""

    def __init__(
        self,
        command: Sequence[str],
        share: Share,
        environment: Mapping[str, str],
        directory: Path | None = None,
        piped: bool = False,
    ) -> None:
        """Start them; `piped`: what they print is for the caller to read."""
        threads = str(max(1, len(os.sched_getaffinity(0)) // share.count))
        defaults = {"OMP_NUM_THREADS": threads, "PYTHONUNBUFFERED": "1", **_interface(share.address)}
        pipe = subprocess.PIPE if piped else None
        self._kill_at: float | None = None
        self._killed = False
        self._statuses: dict[int, int] = {}
        self.cut_short: set[int] = set()
        """Ranks that were killed because their time to stop was over."""
        self.ended_at: dict[int, float] = {}
        """When each was first seen to have ended by itself, by the monotonic clock: who was first is to blame."""
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        for rank in range(share.first, share.first + share.count):
            self.processes[rank] = subprocess.Popen(
                command, env={**defaults, **environment, **share.environment(rank)}, cwd=directory,
                stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, start_new_session=True, preexec_fn=die_with_parent,
            )  # fmt: skip

    def poll(self) -> dict[int, int]:
        """Ranks that have ended by themselves, with their status (-N: by signal N); ends those out of grace."""
        if self._kill_at is not None and time.monotonic() > self._kill_at and not self._killed:
            self.cut_short = {rank for rank, process in self.processes.items() if process.poll() is None}
            self.kill()
        for rank, process in self.processes.items():
            if not self._killed and rank not in self._statuses and process.poll() is not None:
                self._statuses[rank] = process.returncode
                self.ended_at[rank] = time.monotonic()
                signal_session(process, signal.SIGKILL)  # what the rank itself has left behind
        return self._statuses

    @property
    def running(self) -> bool:
        """Whether any has not ended yet."""
        return any(process.poll() is None for process in self.processes.values())

    def terminate(self, grace_s: float) -> None:
        """Ask all to stop; `poll` kills those that have not after `grace_s`. Asked again, the shorter time holds."""
        first, until = self._kill_at is None, time.monotonic() + grace_s
        self._kill_at = until if first else min(until, self._kill_at)
        for rank in self.processes.keys() - self.poll().keys() if first else ():
            signal_session(self.processes[rank], signal.SIGTERM)

    def kill(self) -> None:
        """End all at once, and wait until they have ended.

        One that hangs in the kernel, as in a read of a file system that is gone, ends when that lets it go, without
        doing anything more: it is not waited for.
        """
        self._killed = True
        left = [self.processes[rank] for rank in self.processes.keys() - self._statuses.keys()]
        for process in left:
            signal_session(process, signal.SIGKILL)
        deadline = time.monotonic() + KILLED_S
        for process in left:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))


def signal_session(process: subprocess.Popen[bytes], number: int) -> None:
    """Send a signal to the session that a process leads, which may be gone already."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def route_to(address: str) -> str | None:
    """The own address that packets to `address` have as their sender; no packet is sent. None: there is no way."""
    try:
        found = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)
    except OSError:
        return None
    for family, kind, protocol, _, remote in found:
        with suppress(OSError), socket.socket(family, kind, protocol) as probe:
            probe.connect(remote)
            return str(probe.getsockname()[0])
    return None


def family_of(address: str) -> socket.AddressFamily | None:
    """IPv4 or IPv6; None for what is neither, as the address of an Ethernet card."""
    for family in (socket.AF_INET, socket.AF_INET6):
        with suppress(OSError):
            socket.inet_pton(family, address)
            return family
    return None


def _interface(address: str) -> dict[str, str]:
    """The name of the interface that leads to where the ranks meet, for gloo.

    Left to itself gloo looks up this host's name, which many systems resolve to 127.0.0.1; and the name of the
    interface need not be the same on every host.
    """
    own = route_to(address)
    names = [name for name, found in psutil.net_if_addrs().items() if any(one.address == own for one in found)]
    return {"GLOO_SOCKET_IFNAME": names[0]} if names else {}


@contextmanager
def told_to_stop() -> Iterator[list[int]]:
    """The stop signals that arrive while the block runs, in place of what they would do.

    SIGUSR1 is among them: it is what Slurm is asked to send ahead of the time limit; and SIGHUP, of a terminal that is
    closed, unless it is ignored, as under nohup. Schedulers send SIGTERM more than once without meaning more by it, so
    only a further Ctrl-C counts as a second signal.
    """
    told: list[int] = []
    further = FurtherCtrlC(SAME_KEY_S)

    def hear(number: int, _: object) -> None:
        if further.heard(number) or not told:
            told.append(number)

    before = {number: signal.signal(number, hear) for number in stopping()}
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
