"""Heartbeats: every rank publishes its progress, and from them it is decided which rank blocks the job.

They are written to the job's rendezvous store (`torch.distributed`), over a separate connection. The store runs in rank
0's process, in a thread that needs neither the Python interpreter nor a file system.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import Protocol

from torch.distributed import PrefixStore, Store, TCPStore

from bst_dist.faults.disks import unanswering

_SILENT = "silent (no new heartbeat: its process or host is frozen, has ended, or is cut off from the network)"
NAMED = 4
"""Maximum number of hosts listed in one message."""


@dataclass(frozen=True, kw_only=True)
class Heartbeat:
    """The last progress report of a rank."""

    rank: int
    host: str
    pid: int
    beats: int
    """Number of heartbeats that the rank has sent, including this one."""
    step: int
    phase: str
    entered: int
    """Number of phases that the rank has entered so far."""
    exchange: str
    exchanges: int
    """Number of exchanges (collectives) that the rank has begun so far."""
    still_s: float = 0.0
    """Seconds since it last entered a phase or began an exchange."""
    disks: dict[str, float] = field(default_factory=dict)
    """Directories that do not answer on this rank's host -> seconds without an answer."""

    @property
    def place(self) -> tuple[int, int]:
        """The rank's progress: it has moved when this changes.

        All ranks begin the same exchanges in the same order, but enter phases as often as their own data needs, so only
        `exchanges` says which of two ranks is behind.
        """
        return self.entered, self.exchanges

    def describe(self) -> str:
        """Return the rank's progress as text."""
        return f"step {self.step}, {self.phase}; last exchange begun: {self.exchange} (number {self.exchanges})"

    def name(self) -> str:
        """Return the rank with its host and process id, as text."""
        return f"rank {self.rank} on {self.host} (pid {self.pid})"


class Board(Protocol):
    """A key-value store shared by all ranks; any call may block forever or raise RuntimeError."""

    def put(self, key: str, text: str) -> None:
        """Write a text under a key."""

    def get(self, keys: Sequence[str]) -> list[str | None]:
        """Return the text under each key; None where there is none."""


class StoreBoard:
    """A Board in a torch.distributed store."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def put(self, key: str, text: str) -> None:
        """Write a text under a key."""
        self._store.set(key, text)

    def get(self, keys: Sequence[str]) -> list[str | None]:
        """Return the text under each key; one request for all values when every key exists."""
        if self._store.check(list(keys)):
            return [value.decode() for value in self._store.multi_get(list(keys))]
        return [self._store.get(key).decode() if self._store.check([key]) else None for key in keys]


class LocalBoard:
    """A Board in this process, for a job of one rank."""

    def __init__(self) -> None:
        self._texts: dict[str, str] = {}

    def put(self, key: str, text: str) -> None:
        """Write a text under a key."""
        self._texts[key] = text

    def get(self, keys: Sequence[str]) -> list[str | None]:
        """Return the text under each key; None where there is none."""
        return [self._texts.get(key) for key in keys]


def shared_board(world: int, wait_s: float = 60) -> Board:
    """Return the Board of this job, whose ranks have connected; raises DistStoreError if it does not answer in time."""
    if world == 1:
        return LocalBoard()
    address = os.environ["MASTER_ADDR"]
    port = int(os.environ["MASTER_PORT"])
    # A separate connection: the rank's main connection is locked while it waits for a key.
    store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=wait_s), wait_for_workers=False)
    return StoreBoard(PrefixStore(f"watchdog/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store))


def key_of(rank: int) -> str:
    """Return the key of a rank's heartbeat."""
    return f"rank/{rank}"


def to_json(beat: Heartbeat) -> str:
    """Return a heartbeat as JSON."""
    return json.dumps(asdict(beat))


def from_json(text: str | None) -> Heartbeat | None:
    """Parse a heartbeat; return None when there is none or it is invalid."""
    with suppress(ValueError, TypeError):
        return Heartbeat(**json.loads(text or "null"))
    return None


def find_blocking_ranks(before: Sequence[Heartbeat | None], after: Sequence[Heartbeat | None]) -> list[str] | None:
    """Return messages that name the ranks that block the job; None when a rank has made progress.

    `before`, `after`: the heartbeats of all ranks, read twice with some time in between.
    """
    silent, alive = [], []
    for rank, (one, other) in enumerate(zip(before, after, strict=True)):
        if other is None or one is None or one.beats == other.beats:
            silent.append(silence(rank, other))
        elif one.place != other.place:
            return None
        else:
            alive.append(other)
    lines, waiting = silent, alive
    if not silent:
        furthest = max(beat.exchanges for beat in alive)
        lines = [
            f"{beat.name()}: behind the others, for {beat.still_s:.0f} s in {beat.describe()}"
            for beat in alive
            if beat.exchanges != furthest
        ]
        waiting = [beat for beat in alive if beat.exchanges == furthest]
    if not lines and len(alive) == 1:
        lines = [f"{alive[0].name()}: for {alive[0].still_s:.0f} s in {alive[0].describe()}"]
    elif not lines:
        lines = [f"all ranks are in {waiting[0].describe()}: does the network let them through?"]
    elif waiting:
        lines.append(f"{len(waiting)} of {len(after)} ranks wait, the first of them in {waiting[0].describe()}")
    return [*lines, *_disks(alive)]


def silence(rank: int, last: Heartbeat | None) -> str:
    """Return the message that a rank sends no heartbeats; `last`: its last one, if any."""
    return f"{last.name()}: {_SILENT}; it was in {last.describe()}" if last else f"rank {rank}: silent"


def _disks(beats: Sequence[Heartbeat]) -> list[str]:
    """Return a message for each directory that does not answer, with its hosts."""
    hosts: dict[str, list[str]] = {}
    longest: dict[str, float] = {}
    for beat in beats:
        for path, seconds in beat.disks.items():
            hosts.setdefault(path, []).append(beat.host)
            longest[path] = max(seconds, longest.get(path, 0.0))
    lines = []
    for path, seconds in longest.items():
        names = sorted(set(hosts[path]))
        more = f" and {len(names) - NAMED} more hosts" if len(names) > NAMED else ""
        lines.append(f"the file system hangs: {unanswering({path: seconds})} on {', '.join(names[:NAMED])}{more}")
    return lines
