"""Handling of stop signals: a signal to any rank ends the training of all ranks, after a checkpoint.

Schedulers send a signal some time before a job's time limit or its preemption: usually SIGTERM, or SIGUSR1 if Slurm is
told to (``--signal``). A closed terminal sends SIGHUP. A thread of the rank records the signal immediately, whatever
the main thread is doing. The ranks learn of it through the sums that every step computes anyway. The same signal often
arrives several times: Slurm and a launcher both send it, and Slurm sends SIGTERM again before it kills. So only a
second Ctrl-C (SIGINT), some seconds after the first signal, ends the process immediately: a user sends it on purpose.
While a file system of the run hangs, any further signal does so too, because no checkpoint can be written.

Nothing large is imported here, because signals must be handled while torch is still being imported.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from bst_base.host import die_with_parent
from bst_base.stopping import STOP_REQUESTED
from bst_dist.faults.disks import TOLD_TO_STOP, Disks, unanswering
from bst_dist.faults.ending import end
from bst_dist.faults.status import RESUBMIT, UNREADABLE

if TYPE_CHECKING:
    from bst_dist.parallel.ranks import Ranks

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
SAME_NOTICE_S = 3.0
"""Seconds after the first signal in which further signals count as copies of it."""
STUCK_TICK_S = 0.5


def stopping() -> list[signal.Signals]:
    """Return the signals that stop this process; without SIGHUP if it is ignored, as under nohup."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [number for number in STOPPING if not (number is signal.SIGHUP and ignored)]


class FurtherSignal:
    """Distinguishes a further signal from copies of the first one."""

    def __init__(self, same_within_s: float) -> None:
        """`same_within_s`: seconds after the first signal in which others count as copies of it."""
        self.same_within_s = same_within_s
        self._first_at: float | None = None

    def is_further(self) -> bool:
        """Whether the signal that has just arrived is a further one; call it for every signal, the first included."""
        now = time.monotonic()
        if self._first_at is None:
            self._first_at = now
        return now - self._first_at > self.same_within_s


class Notice:
    """The stop signals that this process has received."""

    def __init__(self, heard: threading.Event | None = None) -> None:
        """`heard`: set at the first signal."""
        self.signal: signal.Signals | None = None
        """The first signal received; None before."""
        self.heard = heard or threading.Event()
        """Set at the first signal."""
        self.again = False
        """Whether a further signal has arrived that is not a copy of the first one."""
        self._further = FurtherSignal(SAME_NOTICE_S)
        self._at_once = False

    def take(self, number: int) -> None:
        """Record a signal; end the process at a second Ctrl-C, or inside `ending_at_once`."""
        self.signal = self.signal or signal.Signals(number)
        self.heard.set()
        if self._further.is_further():
            self.again = True
            if number == signal.SIGINT:
                end(128 + number)
        self._end_if_at_once()

    @contextmanager
    def ending_at_once(self) -> Iterator[None]:
        """Inside the context, end the process immediately with RESUBMIT at a signal.

        Used while the process waits for other ranks to connect and has no state to save.
        """
        self._at_once = True
        self._end_if_at_once()
        try:
            yield
        finally:
            self._at_once = False

    def _end_if_at_once(self) -> None:
        if self._at_once and self.signal is not None:
            end(RESUBMIT, f"bst train: stopped by {self.signal.name} before all ranks had connected")


def end_when_stuck(notice: Notice, disks: Disks) -> None:
    """From now on, end the process at a further signal while a directory of the run does not answer.

    No checkpoint can be written then, and a thread that waits for that file system never sees the first signal. The
    directories are tested from the further signal on: a file of every rank in each second, in the directory where the
    checkpoint is being written, would cost it time when it has least.
    """

    def watch() -> None:
        notice.heard.wait()
        while not notice.again:
            time.sleep(STUCK_TICK_S)
        disks.watch(TOLD_TO_STOP)
        while not (silent := disks.silent()):
            time.sleep(STUCK_TICK_S)
        end(
            UNREADABLE,
            f"bst train: {socket.gethostname()}: told to stop ({notice.signal.name}) more than once, and "
            f"{unanswering(silent)}: ended without a checkpoint; resume from the last one with --resume",
        )

    threading.Thread(target=watch, name="told to stop", daemon=True).start()


def listen() -> Notice:
    """Start to record stop signals in the returned Notice; called once, by the main thread.

    The signal handlers do nothing: Python runs them only between two bytecode instructions of the main thread, and a
    rank that waits in a collective executes none. Instead a thread reads the byte that the interpreter writes to a
    pipe when a signal arrives.

    This thread is the only one that does not block the signals. Processes that the rank starts from now on inherit
    the block, so a scheduler's signal to all processes of the job, such as Slurm's, does not end them: a rank needs
    the compiler's workers for its last step, and a writer's process, such as W&B's, to send the last reports.
    """
    notice = Notice(STOP_REQUESTED)
    ends = stopping()
    heard, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    for number in ends:
        signal.signal(number, lambda *_: None)

    def hear() -> None:
        while True:
            for number in os.read(heard, 64):
                if number in ends:
                    notice.take(number)

    threading.Thread(target=hear, name="signals", daemon=True).start()
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)
    _die_with_launcher()
    return notice


class Stop:
    """The ranks' common decision whether this start ends early because of a signal."""

    def __init__(self, ranks: Ranks, notice: Notice | None = None) -> None:
        self.ranks = ranks
        self.notice = notice or Notice()
        self.stopping = False
        """Whether the ranks stop. It is always equal on all ranks, because it only changes by sums over all ranks."""

    @property
    def local_request(self) -> float:
        """This rank's term in a sum over all ranks: 1 when it has received a signal, else 0."""
        return float(self.notice.signal is not None)

    def update(self, requests: float) -> None:
        """Update the decision with the sum of all ranks' requests."""
        self.stopping = self.stopping or requests > 0

    def poll(self) -> bool:
        """Sum the requests over all ranks and return the decision; for code without another sum. All ranks call it."""
        if not self.stopping:
            self.update(*self.ranks.all_reduce_numbers([self.local_request]))
        return self.stopping


def _die_with_launcher() -> None:
    """If DeepSpeed's launcher started this rank, make the kernel kill it when the launcher ends (Linux).

    A killed launcher cannot end its ranks, and nothing else would.
    """
    parent = os.getppid()
    try:
        command = Path(f"/proc/{parent}/cmdline").read_bytes()
    except OSError:
        return
    if b"deepspeed.launcher.launch" in command:
        die_with_parent()
        if os.getppid() != parent:  # the launcher ended before the call took effect
            os._exit(128 + signal.SIGKILL)
