"""Where each rank is, as all ranks can learn it, and who holds up the job by that.

Heartbeats go through the store in which the ranks of a job met (`torch.distributed`), by a connection of their own. It
lives in rank 0's process, in a thread that needs neither Python nor a file system.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import Protocol

from torch.distributed import PrefixStore, Store, TCPStore

from bst_dist.faults.disks import unanswering

_GONE = "its process or its host is frozen or gone"
NAMED = 4
"""Hosts named where many have the same to say."""


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
    still_s: float = 0.0
    """Since it last entered a phase or began an exchange."""
    disks: dict[str, float] = field(default_factory=dict)
    """Directories that do not answer it, and since how many seconds."""

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


class Board(Protocol):
    """What every rank writes to and reads; any call may take forever, or raise RuntimeError."""

    def put(self, key: str, text: str) -> None:
        """Write a text."""

    def get(self, keys: Sequence[str]) -> list[str | None]:
        """What is written under each key."""


class StoreBoard:
    """A board in a store."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def put(self, key: str, text: str) -> None:
        """As of a board."""
        self._store.set(key, text)

    def get(self, keys: Sequence[str]) -> list[str | None]:
        """As of a board; one request when all are written."""
        if self._store.check(list(keys)):
            return [value.decode() for value in self._store.multi_get(list(keys))]
        return [self._store.get(key).decode() if self._store.check([key]) else None for key in keys]


class LocalBoard:
    """A board in this process, for a rank alone."""

    def __init__(self) -> None:
        self._texts: dict[str, str] = {}

    def put(self, key: str, text: str) -> None:
        """As of a board."""
        self._texts[key] = text

    def get(self, keys: Sequence[str]) -> list[str | None]:
        """As of a board."""
        return [self._texts.get(key) for key in keys]


def shared_board(world: int, environment: Mapping[str, str] = os.environ, wait_s: float = 60) -> Board:
    """The board of the ranks of this job, which have joined; raises DistStoreError when it does not answer in time."""
    if world == 1:
        return LocalBoard()
    address, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    # A connection of its own: the ranks' own is locked while one of them waits for a key.
    store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=wait_s), wait_for_workers=False)
    return StoreBoard(PrefixStore(f"watchdog/{environment.get('TORCHELASTIC_RESTART_COUNT', 0)}", store))


def key_of(rank: int) -> str:
    """Where a rank's heartbeat is written."""
    return f"rank/{rank}"


def written(beat: Heartbeat) -> str:
    """A heartbeat as text."""
    return json.dumps(asdict(beat))


def read(text: str | None) -> Heartbeat | None:
    """A heartbeat from its text; None when there is none."""
    with suppress(ValueError, TypeError):
        return Heartbeat(**json.loads(text or "null"))
    return None


def judge(before: Sequence[Heartbeat | None], after: Sequence[Heartbeat | None]) -> list[str] | None:
    """Who holds up the job, from two readings of all ranks' heartbeats, a while apart; None when a rank has moved."""
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
        furthest = max(beat.place for beat in alive)
        lines = [f"{beat.name()}: behind the others, for {beat.still_s:.0f} s in {beat.describe()}"
                 for beat in alive if beat.place != furthest]  # fmt: skip
        waiting = [beat for beat in alive if beat.place == furthest]
    if not lines and len(alive) == 1:
        lines = [f"{alive[0].name()}: for {alive[0].still_s:.0f} s in {alive[0].describe()}"]
    elif not lines:
        lines = [f"all ranks are in {waiting[0].describe()}: does the network let them through?"]
    elif waiting:
        lines.append(f"{len(waiting)} of {len(after)} ranks wait, the first of them in {waiting[0].describe()}")
    return [*lines, *_disks(alive)]


def silence(rank: int, last: Heartbeat | None) -> str:
    """That nothing comes from a rank any more; `last`: what did."""
    return f"{last.name()}: silent, {_GONE}; it was in {last.describe()}" if last else f"rank {rank}: silent"


def _disks(beats: Sequence[Heartbeat]) -> list[str]:
    """Which directories do not answer, and on which hosts."""
    hosts: dict[str, list[str]] = {}
    longest: dict[str, float] = {}
    for beat in beats:
        for path, seconds in beat.disks.items():
            hosts.setdefault(path, []).append(beat.host)
            longest[path] = max(seconds, longest.get(path, 0.0))
    lines = []
    for path, seconds in longest.items():
        there = sorted(set(hosts[path]))
        more = f" and {len(there) - NAMED} more hosts" if len(there) > NAMED else ""
        lines.append(f"the file system hangs: {unanswering({path: seconds})} on {', '.join(there[:NAMED])}{more}")
    return lines
