"""The ranks of a job on one host: started with their rendezvous variables, watched, and ended together.

`bst train` runs them itself; on a cluster an agent on every host does. DeepSpeed's own `launch` is not used: it turns
every signal into status 1, and gives the ranks 30 seconds one after the other, but a checkpoint needs all of them at
the same time.
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

from bst_base.host import die_with_parent
from bst_dist.faults.ending import LAST_WORD
from bst_dist.faults.signals import FurtherSignal, stopping
from bst_dist.parallel.interface import gloo_interface

SAME_KEY_S = 0.5
"""Seconds after the first signal in which a SIGINT is taken for a copy of it (or the same press of Ctrl-C)."""
KILLED_S = 10.0
"""Maximum seconds to wait until killed processes have ended."""


@dataclass(frozen=True)
class HostRanks:
    """One host's ranks, and the rendezvous address of the job."""

    first: int
    """Lowest rank on the host; its ranks are consecutive."""
    count: int
    world: int
    address: str
    """Address of rank 0's host."""
    port: int

    def environment(self, rank: int) -> dict[str, str]:
        """Return the variables that `torch.distributed` and DeepSpeed read; they are set only here."""
        return {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank - self.first),
            "WORLD_SIZE": str(self.world),
            "LOCAL_WORLD_SIZE": str(self.count),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
        }


class LocalRanks:
    """The processes of a share. Each leads its own session, and is killed when the process that started it ends."""

    def __init__(
        self,
        command: Sequence[str],
        share: HostRanks,
        environment: Mapping[str, str],
        directory: Path | None = None,
        piped: bool = False,
    ) -> None:
        """Start the processes; `piped`: the caller reads their output from pipes."""
        threads = str(max(1, len(os.sched_getaffinity(0)) // share.count))
        defaults = {"OMP_NUM_THREADS": threads, "PYTHONUNBUFFERED": "1", **gloo_interface(share.address)}
        pipe = subprocess.PIPE if piped else None
        self._kill_at: float | None = None
        self._killed = False
        self._statuses: dict[int, int] = {}
        self.cut_short: set[int] = set()
        """Ranks that were killed because they took longer to stop than the grace period."""
        self.ended_at: dict[int, float] = {}
        """When each rank was first seen to have ended by itself (monotonic clock): the first to fail is blamed."""
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        self._last_words: dict[int, int] = {}
        self._said: dict[int, int] = {}
        for rank in range(share.first, share.first + share.count):
            self._last_words[rank], word = os.pipe()
            os.set_blocking(self._last_words[rank], False)
            own = {**share.environment(rank), LAST_WORD: str(word)}
            self.processes[rank] = subprocess.Popen(
                command,
                env={**defaults, **environment, **own},
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=pipe,
                stderr=pipe,
                start_new_session=True,
                preexec_fn=die_with_parent,
                pass_fds=[word],
            )
            os.close(word)

    def poll(self) -> dict[int, int]:
        """Return rank -> exit status (-N: by signal N) of the ranks that have ended by themselves.

        Also kills the ranks whose grace period is over.
        """
        if self._kill_at is not None and time.monotonic() > self._kill_at and not self._killed:
            self.cut_short = {rank for rank in self.processes if self._status(rank) is None}
            self.kill()
        for rank, process in self.processes.items():
            if not self._killed and rank not in self._statuses and (status := self._status(rank)) is not None:
                self._statuses[rank] = status
                self.ended_at[rank] = time.monotonic()
                signal_session(process, signal.SIGKILL)  # processes that the rank left behind
        return self._statuses

    def _status(self, rank: int) -> int | None:
        """Return a rank's exit status; None while it runs.

        A rank whose thread hangs in the kernel reports its status through a pipe when it exits. It does nothing more
        then, although the kernel still shows it as running.
        """
        if rank in self._statuses:
            return self._statuses[rank]
        status, word = self.processes[rank].poll(), self._last_words.get(rank)
        if word is not None:
            with suppress(BlockingIOError):
                if said := os.read(word, 64).split():
                    self._said[rank] = int(said[-1])  # kept, because it can be read from the pipe only once
            if status is not None or rank in self._said:
                os.close(self._last_words.pop(rank))
        return self._said.get(rank) if status is None else status

    @property
    def running(self) -> bool:
        """Whether any rank has not ended yet."""
        return any(self._status(rank) is None for rank in self.processes)

    @property
    def stopping(self) -> bool:
        """Whether the ranks have been asked to stop."""
        return self._kill_at is not None

    def terminate(self, grace_s: float) -> None:
        """Send SIGTERM to all ranks; `poll` kills those that run after `grace_s`.

        A second call sends no signal, but may shorten the time. Only the ranks themselves get the signal: it would end
        the processes that they have started, such as the compiler's, which they may need for their last step.
        """
        first, until = self._kill_at is None, time.monotonic() + grace_s
        self._kill_at = until if first else min(until, self._kill_at)
        for rank in self.processes.keys() - self.poll().keys() if first else ():
            self.processes[rank].send_signal(signal.SIGTERM)

    def remind(self) -> None:
        """Send SIGTERM again to the ranks that still run, because the user or a scheduler has repeated its signal."""
        for rank in self.processes.keys() - self.poll().keys():
            self.processes[rank].send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Kill all ranks, and wait until they have ended, at most KILLED_S.

        A rank that hangs in the kernel, for example in a read from an unreachable file system, ends when that call
        returns, and does nothing more: it is not waited for.
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
    """Send a signal to the session that a process leads; do nothing if it has already ended."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def family_of(address: str) -> socket.AddressFamily | None:
    """Return whether an address is IPv4 or IPv6; None for other addresses, such as Ethernet's."""
    for family in (socket.AF_INET, socket.AF_INET6):
        with suppress(OSError):
            socket.inet_pton(family, address)
            return family
    return None


@dataclass
class StopSignals:
    """The stop signals that this process has received."""

    first: int | None = None
    """Number of the first one."""
    at_once: bool = False
    """Whether Ctrl-C came after it: the ranks are ended immediately."""
    repeats: int = 0
    """Number of further signals other than Ctrl-C; the ranks ignore them as long as they can write their checkpoint."""


@contextmanager
def catch_stop_signals() -> Iterator[StopSignals]:
    """Collect the stop signals that arrive inside the context, instead of their default actions.

    They include SIGUSR1, which Slurm can send before the time limit, and SIGHUP of a closed terminal, unless it is
    ignored as under nohup. Schedulers repeat SIGTERM without further meaning, so only a further Ctrl-C counts as a
    second signal. Other repeated signals are passed on to the ranks (`signals.end_when_stuck`).
    """
    received = StopSignals()
    further = FurtherSignal(SAME_KEY_S)

    def hear(number: int, _: object) -> None:
        again = further.is_further()
        if received.first is None:
            received.first = number
        elif again and number == signal.SIGINT:
            received.at_once = True
        elif again:
            received.repeats += 1

    before = {number: signal.signal(number, hear) for number in stopping()}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
