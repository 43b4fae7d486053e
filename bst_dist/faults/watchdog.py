"""The watchdog: ends a job that hangs, and names the rank that blocks the others.

Each rank has three threads, so that the thread that decides is never blocked:

- one sends the rank's heartbeats and reads those of others (`heartbeats`); the network may block it;
- one writes the stacks of all threads and torch's flight recorder; a file system may block it;
- one checks whether the rank makes progress, and decides with what the others have found by then.

When rank 0 has entered no phase and begun no exchange for `watchdog.limit_s`, it reads all heartbeats twice:

- a rank whose heartbeat has not changed is *silent*: its process or host is frozen, has ended, or is cut off from
  the network;
- otherwise the ranks that are *behind*, by the exchanges they have begun, block those ahead;
- if all ranks have begun as many, the network between them is the most likely cause.

If any rank makes progress between the two readings, the job was only slow, and the watch continues. Otherwise rank 0
tells the other ranks, and all end. If rank 0 itself is silent (the store with the heartbeats is in its process), the
other ranks report that.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from torch.distributed import DistStoreError

from bst_dist.faults.config import WatchdogConfig
from bst_dist.faults.disks import STILL, Disks
from bst_dist.faults.ending import end as end_process
from bst_dist.faults.heartbeats import Board, Heartbeat, find_blocking_ranks, from_json, key_of, silence, to_json
from bst_dist.faults.stacks import RECORDER, STACKS, write_stacks
from bst_dist.faults.status import HUNG
from bst_dist.parallel.phases import Phases

VERDICT = "verdict"
BEAT_S = 5.0
LONGEST_SILENCE_S = 30.0
"""Seconds without a new heartbeat after which a rank is silent."""
FILES_S = 5.0
"""Maximum seconds to wait until the stacks are written."""


@dataclass(frozen=True)
class Reading:
    """The heartbeats and the verdict read from the board at one time."""

    number: int
    beats: list[Heartbeat | None]
    verdict: str | None


class Watchdog:
    """Watches one rank inside its context."""

    def __init__(
        self,
        config: WatchdogConfig,
        run_dir: Path,
        rank: int,
        world: int,
        phases: Phases,
        board: Board,
        disks: Disks,
        end: Callable[..., object] = end_process,
    ) -> None:
        """`end`: called with the exit status and the message when the job hangs."""
        self.limit_s, self.stacks, self.rank, self.phases = config.limit_s, run_dir / STACKS, rank, phases
        self.silence_s = min(LONGEST_SILENCE_S, self.limit_s / 2)
        self.beat_s = min(BEAT_S, self.silence_s / 4)
        self._seen_ranks = range(world) if rank == 0 else (0,)
        self._board, self._disks, self._end = board, disks, end
        self._still_since = time.monotonic()
        self._wanted = threading.Event()
        self._reading = Reading(0, [None] * len(self._seen_ranks), None)
        self._closed, self._dump, self._dumped = threading.Event(), threading.Event(), threading.Event()
        runs = {"watchdog": self._watch, "heartbeats": self._talk, "stacks": self._write_files}
        self._threads = [threading.Thread(target=run, name=name, daemon=True) for name, run in runs.items()]

    def __enter__(self) -> Watchdog:
        if self.limit_s:
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._dump.set()
        if self.limit_s:
            self._threads[0].join()  # the other threads may be blocked, but they cannot end the process

    def _place(self) -> tuple[int, int]:
        return self.phases.entered, self.phases.exchanges

    def _watch(self) -> None:
        seen = self._place()
        while not self._closed.wait(self.beat_s):
            still_s = time.monotonic() - self._still_since
            if self._place() != seen:
                seen = self._place()
                self._still_since = time.monotonic()
                self._disks.watch(STILL, wanted=False)
            elif still_s > self.limit_s:
                self._look_into_it(seen, still_s)
                self._still_since = time.monotonic()  # slow, but not hanging
            elif still_s > self.limit_s / 2:
                self._disks.watch(STILL)

    def _look_into_it(self, seen: tuple[int, int], still_s: float) -> None:
        """End this rank if the job hangs; return if it does not, or if the watchdog is closed."""
        self._dumped.clear()
        self._dump.set()
        self._wanted.set()
        verdict = self._judge() if self.rank == 0 else self._follow(seen)
        self._wanted.clear()
        if verdict is None or self._closed.is_set():
            return
        if verdict:
            verdict = f"bst train: no rank has moved for {still_s:.0f} s (watchdog.limit_s)\n  {verdict}"
            verdict += f"\n  {self._where_stacks_are()}"
        self._end(HUNG, verdict, stacks=bool(verdict) and not self._dumped.is_set())

    def _judge(self) -> str | None:
        """On rank 0: return the message that names the blocking ranks, after publishing it; None if none blocks."""
        before = self._read_anew()
        self._closed.wait(self.silence_s)
        after = self._read_anew()
        if before is None or after is None:
            return "the ranks' rendezvous store does not answer: is the process or the host that holds it frozen?"
        lines = find_blocking_ranks(before.beats, after.beats)
        if lines is None:
            return None
        verdict = "\n  ".join(lines)
        # In a thread, because the store may hang.
        threading.Thread(target=self._board.put, args=(VERDICT, verdict), daemon=True).start()
        self._closed.wait(self.beat_s)
        return verdict

    def _follow(self, seen: tuple[int, int]) -> str | None:
        """On other ranks: wait for rank 0's verdict.

        Returns "" when rank 0 reports it, a message when rank 0 is silent, and None when the job makes progress.
        """
        last = None
        last_new = time.monotonic()
        while self._place() == seen and not self._closed.is_set():
            reading = self._read_anew()
            beat = reading.beats[0] if reading else None
            if reading and reading.verdict is not None:
                self._closed.wait(2 * self.beat_s)  # let rank 0 print first: a launcher ends all ranks when one ends
                return ""
            if beat is not None and last is not None and beat.place != last.place:
                return None
            if beat is not None and (last is None or beat.beats != last.beats):
                last = beat
                last_new = time.monotonic()
            elif time.monotonic() - last_new > self.silence_s:
                self._closed.wait((self.rank > 1) * 2 * self.beat_s)  # rank 1 reports for all
                return silence(0, last or self._reading.beats[0])
        return None

    def _read_anew(self) -> Reading | None:
        """Return a new reading of the board; None when the board does not answer in time."""
        since = self._reading.number
        until = time.monotonic() + self.silence_s
        while time.monotonic() < until and not self._closed.wait(self.beat_s / 4):
            if self._reading.number > since + 1:  # +1: that reading began after this call
                return self._reading
        return None

    def _talk(self) -> None:
        beats = 0
        keys = [*map(key_of, self._seen_ranks)]
        while not self._closed.is_set():
            beats += 1
            with suppress(DistStoreError, RuntimeError):  # rank 0 is gone; `_judge` and `_follow` detect that
                self._board.put(key_of(self.rank), to_json(self._beat(beats)))
                if self._wanted.is_set() or beats == 1:
                    *texts, verdict = self._board.get([*keys, VERDICT])
                    self._reading = Reading(self._reading.number + 1, [*map(from_json, texts)], verdict)
            self._closed.wait(self.beat_s / (4 if self._wanted.is_set() else 1))

    def _beat(self, beats: int) -> Heartbeat:
        phases = self.phases
        return Heartbeat(
            rank=self.rank,
            host=socket.gethostname(),
            pid=os.getpid(),
            beats=beats,
            step=phases.step,
            phase=phases.name,
            entered=phases.entered,
            exchange=phases.exchange,
            exchanges=phases.exchanges,
            still_s=time.monotonic() - self._still_since,
            disks=self._disks.silent(min(self.silence_s, self.limit_s / 4)),
        )

    def _where_stacks_are(self) -> str:
        if not self._dumped.wait(FILES_S):
            return f"cannot write stacks to {self.stacks}, which does not answer; this rank's stacks follow"
        return (
            f"stacks of all ranks that could write them: {self.stacks}; their exchanges as torch recorded them: "
            f"torchfrtrace --allow-incomplete-ranks {self.stacks / RECORDER}"
        )

    def _write_files(self) -> None:
        while self._dump.wait() and not self._closed.is_set():
            self._dump.clear()
            with suppress(OSError):
                write_stacks(self.stacks, self.rank)
            self._dumped.set()
