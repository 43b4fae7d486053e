"""Names the rank that holds up all the others, and ends a job that stands still.

Each rank's watchdog is a thread. Every few seconds it writes down where its rank is, in a small file in the run
directory that the others can read when the rank, or its host, is frozen; it needs no collective for that. When its own
rank has not moved for the limit, it writes down the stacks of all threads, reads the others' files twice and judges:

- a rank whose file has not changed is *silent*: its process or its host is frozen or gone;
- otherwise the ranks that are furthest *behind*, by the phases and exchanges they have begun, hold up those ahead;
- when all are at the same place, what is between them does not get through.

If any rank moves between the two readings it was only slow, and the watch goes on.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from bst_dist.faults.config import WatchdogConfig
from bst_dist.faults.status import HUNG
from bst_dist.parallel.phases import Phases

HEARTBEATS, STACKS = "heartbeats", "stacks"
_GONE = "its process or its host is frozen or gone"
BEAT_S = 2.0
LONGEST_SILENCE_S = 60.0
"""How long a file may stay the same before its rank is silent; network file systems show changes late."""


@dataclass(frozen=True)
class Heartbeat:
    """Where a rank is, as it last said."""

    rank: int
    host: str
    pid: int
    beats: int
    """How often it has said so."""
    step: int
    phase: str
    entered: int
    exchange: str
    exchanges: int

    @property
    def place(self) -> tuple[int, int]:
        """How far it is, in what all ranks do alike and in the same order."""
        return self.entered, self.exchanges

    def describe(self) -> str:
        """Where the rank is, in words."""
        return f"step {self.step}, {self.phase}; last exchange begun: {self.exchange} (number {self.exchanges})"

    def name(self) -> str:
        """Which process of which host it is."""
        return f"rank {self.rank} on {self.host} (pid {self.pid})"


class Watchdog:
    """Watches over one rank."""

    def __init__(self, config: WatchdogConfig, run_dir: Path, rank: int, world: int, phases: Phases,
                 end: Callable[[int], object] = os._exit) -> None:  # fmt: skip
        """`end` is called with the exit status when the job hangs."""
        self.limit_s, self.run_dir, self.rank, self.world, self.phases = config.limit_s, run_dir, rank, world, phases
        self.silence_s = min(LONGEST_SILENCE_S, self.limit_s / 2)
        self.beat_s = min(BEAT_S, self.silence_s / 4)
        self._end = end
        self._beats = 0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True) if self.limit_s else None

    def __enter__(self) -> Watchdog:
        if self._thread:
            for directory in (HEARTBEATS, STACKS):
                (self.run_dir / directory).mkdir(parents=True, exist_ok=True)
            self._beat()
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        if self._thread:
            self._thread.join()

    def _watch(self) -> None:
        seen, since = self._place(), time.monotonic()
        while not self._closed.wait(self.beat_s):
            self._beat()
            if self._place() != seen:
                seen, since = self._place(), time.monotonic()
            elif time.monotonic() - since > self.limit_s:
                self._judge(time.monotonic() - since)
                since = time.monotonic()  # it is slow, and does not hang

    def _place(self) -> tuple[int, int]:
        return self.phases.entered, self.phases.exchanges

    def _beat(self) -> None:
        """Say where the rank is; a file system in trouble must not end the watch."""
        self._beats += 1
        phases = self.phases
        beat = Heartbeat(self.rank, socket.gethostname(), os.getpid(), self._beats, phases.step, phases.name,
                         phases.entered, phases.exchange, phases.exchanges)  # fmt: skip
        path = self._file(self.rank)
        try:
            path.with_suffix(".new").write_text(json.dumps(asdict(beat)))
            path.with_suffix(".new").replace(path)
        except OSError as error:
            print(f"{path}: {error}", file=sys.stderr, flush=True)

    def _file(self, rank: int) -> Path:
        return self.run_dir / HEARTBEATS / f"rank-{rank:05d}.json"

    def _read(self) -> list[Heartbeat | None]:
        """What each rank last said; None where nothing can be read."""
        beats: list[Heartbeat | None] = []
        for rank in range(self.world):
            try:
                beats.append(Heartbeat(**json.loads(self._file(rank).read_text())))
            except (OSError, ValueError, TypeError):
                beats.append(None)
        return beats

    def _judge(self, still_s: float) -> None:
        """End this rank if no rank moves; the first that is not silent says why, for all."""
        stacks = self.run_dir / STACKS / f"rank-{self.rank:05d}.txt"
        with suppress(OSError), stacks.open("w", encoding="utf-8") as file:
            file.write(f"rank {self.rank} on {socket.gethostname()}, {time.strftime('%Y-%m-%dT%H:%M:%S%z')}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        before, until = self._read(), time.monotonic() + self.silence_s
        while time.monotonic() < until and not self._closed.wait(self.beat_s):
            self._beat()
        verdict = judge(before, self._read())
        if verdict is None or self._closed.is_set():
            return
        speaker, lines = verdict
        text = "\n  ".join([f"bst train: no rank has moved for {still_s:.0f} s (watchdog.limit_s)", *lines,
                            f"stacks of all ranks that could write them: {stacks.parent}"])  # fmt: skip
        with suppress(OSError), stacks.open("a", encoding="utf-8") as file:
            file.write(f"\n{text}\n")
        if speaker == self.rank:
            print(text, file=sys.stderr, flush=True)
        else:
            time.sleep(2 * self.beat_s)  # when the first has ended the launcher ends the others, before they speak
        self._end(HUNG)


def judge(before: Sequence[Heartbeat | None], after: Sequence[Heartbeat | None]) -> tuple[int, list[str]] | None:
    """Who holds up the job, from two readings of all ranks' files: the rank to say so, and what it says.

    None when a rank has moved in between.
    """
    silent, alive = [], []
    for rank, (one, other) in enumerate(zip(before, after, strict=True)):
        if other is None or one is None or one.beats == other.beats:
            said = f"{other.name()}: silent, {_GONE}; it was in {other.describe()}" if other else f"rank {rank}: silent"
            silent.append(said)
        elif one.place != other.place:
            return None
        else:
            alive.append(other)
    lines, waiting = silent, alive
    if not silent:
        furthest = max(beat.place for beat in alive)
        lines = [f"{beat.name()}: behind the others, in {beat.describe()}" for beat in alive if beat.place != furthest]
        waiting = [beat for beat in alive if beat.place == furthest]
    if not lines and len(alive) == 1:
        lines = [f"{alive[0].name()}: in {alive[0].describe()}"]
    elif not lines:
        lines = [f"all ranks are in {waiting[0].describe()}: does the network let them through?"]
    elif waiting:
        lines.append(f"{len(waiting)} of {len(after)} ranks wait, the first of them in {waiting[0].describe()}")
    return min((beat.rank for beat in alive), default=0), lines
