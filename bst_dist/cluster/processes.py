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
from bst_dist.faults.ending import LAST_WORD
from bst_dist.faults.signals import FurtherSignal, stopping

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
        self._last_words: dict[int, int] = {}
        self._said: dict[int, int] = {}
        for rank in range(share.first, share.first + share.count):
            self._last_words[rank], word = os.pipe()
            os.set_blocking(self._last_words[rank], False)
            own = {**share.environment(rank), LAST_WORD: str(word)}
            self.processes[rank] = subprocess.Popen(
                command, env={**defaults, **environment, **own}, cwd=directory, stdin=subprocess.DEVNULL, stdout=pipe,
                stderr=pipe, start_new_session=True, preexec_fn=die_with_parent, pass_fds=[word],
            )  # fmt: skip
            os.close(word)

    def poll(self) -> dict[int, int]:
        """Ranks that have ended by themselves, with their status (-N: by signal N); ends those out of grace."""
        if self._kill_at is not None and time.monotonic() > self._kill_at and not self._killed:
            self.cut_short = {rank for rank in self.processes if self._status(rank) is None}
            self.kill()
        for rank, process in self.processes.items():
            if not self._killed and rank not in self._statuses and (status := self._status(rank)) is not None:
                self._statuses[rank] = status
                self.ended_at[rank] = time.monotonic()
                signal_session(process, signal.SIGKILL)  # what the rank itself has left behind
        return self._statuses

    def _status(self, rank: int) -> int | None:
        """How a rank has ended; None while it runs. One that ends with a thread that hangs in the kernel has said so,
        and does nothing more, though the kernel shows it as running."""
        if rank in self._statuses:
            return self._statuses[rank]
        status, word = self.processes[rank].poll(), self._last_words.get(rank)
        if word is not None:
            with suppress(BlockingIOError):
                if said := os.read(word, 64).split():
                    self._said[rank] = int(said[-1])  # kept, for it is read once, whoever asks first
            if status is not None or rank in self._said:
                os.close(self._last_words.pop(rank))
        return self._said.get(rank) if status is None else status

    @property
    def running(self) -> bool:
        """Whether any has not ended yet."""
        return any(self._status(rank) is None for rank in self.processes)

    @property
    def stopping(self) -> bool:
        """Whether they have been asked to stop."""
        return self._kill_at is not None

    def terminate(self, grace_s: float) -> None:
        """Ask all to stop; `poll` kills those that have not after `grace_s`. Asked again, the shorter time holds."""
        first, until = self._kill_at is None, time.monotonic() + grace_s
        self._kill_at = until if first else min(until, self._kill_at)
        for rank in self.processes.keys() - self.poll().keys() if first else ():
            signal_session(self.processes[rank], signal.SIGTERM)

    def remind(self) -> None:
        """Send those that were asked to stop another signal, as somebody has sent one again."""
        for rank in self.processes.keys() - self.poll().keys():
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


class Told(list[int]):
    """The signal that told this process to stop, and a further Ctrl-C."""

    repeats = 0
    """Further signals of other kinds, which change nothing while the ranks can write their checkpoint."""


@contextmanager
def told_to_stop() -> Iterator[Told]:
    """The stop signals that arrive while the block runs, in place of what they would do.

    SIGUSR1 is among them: it is what Slurm is asked to send ahead of the time limit; and SIGHUP, of a terminal that is
    closed, unless it is ignored, as under nohup. Schedulers send SIGTERM more than once without meaning more by it, so
    only a further Ctrl-C counts as a second signal. Others are for the ranks to judge (`signals.end_when_stuck`).
    """
    told = Told()
    further = FurtherSignal(SAME_KEY_S)

    def hear(number: int, _: object) -> None:
        again = further.heard()
        if again and number != signal.SIGINT:
            told.repeats += 1
        elif again or not told:
            told.append(number)

    before = {number: signal.signal(number, hear) for number in stopping()}
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
