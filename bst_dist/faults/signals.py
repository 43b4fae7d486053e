"""Being told to stop: a signal to any rank ends the training of all of them, after a checkpoint.

Schedulers announce the end of a job's time, or its preemption, with a signal some time ahead: SIGTERM mostly, SIGUSR1
where Slurm is asked to (``--signal``); a terminal that is closed sends SIGHUP. A rank takes note of it at once, in a
thread, whatever its main thread is doing; the ranks learn of each other's in the sums that a step makes anyway. The
same notice often comes twice or more: Slurm and a launcher both send it, and Slurm sends SIGTERM again before it kills.
So only a further Ctrl-C (SIGINT), after a while, ends the process on the spot: a person sends it and means it. Any
further signal does while a file system of the run hangs: there is no checkpoint to wait for.

Nothing large is imported here: a signal must be heard while torch is still being imported.
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
from bst_base.stopping import TOLD
from bst_dist.faults.disks import Disks, unanswering
from bst_dist.faults.ending import end
from bst_dist.faults.status import RESUBMIT, UNREADABLE

if TYPE_CHECKING:
    from bst_dist.parallel.ranks import Ranks

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
SAME_NOTICE_S = 3.0
"""A further signal within this time is another copy of the first."""
STUCK_TICK_S = 0.5


def stopping() -> list[signal.Signals]:
    """Those that mean it for this process: who was started under nohup is not to hear of its terminal's end."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [number for number in STOPPING if not (number is signal.SIGHUP and ignored)]


class FurtherSignal:
    """Tells a further signal from more copies of the first notice."""

    def __init__(self, same_within_s: float) -> None:
        """`same_within_s`: what comes within this time of the first signal is another copy of it."""
        self.same_within_s = same_within_s
        self._first_at: float | None = None

    def heard(self) -> bool:
        """Whether the signal that has come now is one; called for every signal, the first included."""
        now = time.monotonic()
        if self._first_at is None:
            self._first_at = now
        return now - self._first_at > self.same_within_s


class Notice:
    """What this process has been told."""

    def __init__(self, heard: threading.Event | None = None) -> None:
        """`heard`: set with the first signal."""
        self.signal: signal.Signals | None = None
        """The first signal that came; None while none has."""
        self.heard, self.again = heard or threading.Event(), False
        """Set with the first; whether a further one has come that is no copy of it."""
        self._further = FurtherSignal(SAME_NOTICE_S)
        self._at_once = False

    def take(self, number: int) -> None:
        """Take note of a signal; ends the process at a second Ctrl-C, or while there is nothing to save."""
        self.signal = self.signal or signal.Signals(number)
        self.heard.set()
        if self._further.heard():
            self.again = True
            if number == signal.SIGINT:
                end(128 + number)
        self._end_if_at_once()

    @contextmanager
    def ending_at_once(self) -> Iterator[None]:
        """While the block runs, a signal ends the process on the spot with RESUBMIT: it only waits for other ranks,
        and holds nothing yet that a checkpoint could save."""
        self._at_once = True
        self._end_if_at_once()
        try:
            yield
        finally:
            self._at_once = False

    def _end_if_at_once(self) -> None:
        if self._at_once and self.signal is not None:
            end(RESUBMIT, f"bst train: stopped by {self.signal.name} before all ranks had joined")


def end_when_stuck(notice: Notice, disks: Disks) -> None:
    """From now on end the process after a further signal while a directory of the run does not answer: no checkpoint
    can be written then, and no thread that waits for that file system will ever look at the first signal."""

    def watch() -> None:
        notice.heard.wait()
        disks.watch("told to stop")
        while not (notice.again and (silent := disks.silent())):
            time.sleep(STUCK_TICK_S)
        end(UNREADABLE, f"bst train: {socket.gethostname()}: told to stop ({notice.signal.name}) more than once, and "
            f"{unanswering(silent)}: ended without a checkpoint; resume from the last one with --resume")  # fmt: skip

    threading.Thread(target=watch, name="told to stop", daemon=True).start()


def listen() -> Notice:
    """From now on take the signals as a wish to stop; called once, by the main thread.

    The handler proper does nothing: Python runs it only between two of its own instructions, and a rank that waits in
    a collective has none. The byte that the interpreter writes when the signal arrives is read by a thread.
    """
    notice, ends = Notice(TOLD), stopping()
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
    _die_with_launcher()
    return notice


class Stop:
    """What the ranks know in common: whether this start ends before its steps are done."""

    def __init__(self, ranks: Ranks, notice: Notice | None = None) -> None:
        self.ranks, self.notice = ranks, notice or Notice()
        self.agreed = False
        """Equal on all ranks at all times: it changes only by sums over all of them."""

    @property
    def wish(self) -> float:
        """This rank's part of a sum over all ranks: 1 when it has been told to stop, else 0."""
        return float(self.notice.signal is not None)

    def learn(self, wishes: float) -> None:
        """Take in the sum of all ranks' wishes."""
        self.agreed = self.agreed or wishes > 0

    def poll(self) -> bool:
        """Ask all ranks, which must all call this: for places that make no sum of their own."""
        if not self.agreed:
            self.learn(*self.ranks.sum([self.wish]))
        return self.agreed


def _die_with_launcher() -> None:
    """When DeepSpeed's launcher started this rank, have the kernel end it with the launcher, however that ends (Linux).

    A launcher that is killed outright cannot end its ranks, and nobody else would.
    """
    parent = os.getppid()
    try:
        command = Path(f"/proc/{parent}/cmdline").read_bytes()
    except OSError:
        return
    if b"deepspeed.launcher.launch" in command:
        die_with_parent()
        if os.getppid() != parent:  # it ended before the kernel knew
            os._exit(128 + signal.SIGKILL)
