"""Simulate many ranks in one process, and count what every rank opens, reads and computes outside its training steps.

Each simulated rank is a thread that runs the same code as a rank of a real run. One thread runs at a time, and all
ranks wait for each other at every collective. The interpreter (audit hook) and the kernel (/proc) report file opens and
bytes read per thread, so the counts are exact.
"""

from __future__ import annotations

import bisect
import os
import pickle
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from bst_dist.checkpoint.directory import MOMENTS, WEIGHT
from bst_dist.checkpoint.fragments import Fragment
from bst_dist.checkpoint.index import equal_part
from bst_dist.checkpoint.shards import Piece
from bst_dist.parallel.phases import Phases

T = TypeVar("T")


@dataclass
class Counts:
    """Files, bytes, collectives and CPU time of one rank."""

    opens: list[str] = field(default_factory=list)
    """Files opened, by path."""
    read_bytes: int = 0
    received_bytes: int = 0
    """Received in collectives. In a gather of objects, each rank receives world size times the largest object."""
    collectives: int = 0
    cpu_s: float = 0.0


class Abandoned(Exception):
    """Raised in waiting ranks when another rank has failed."""


class World:
    """`size` simulated ranks, of which all or only some really run.

    If the work is the same on all ranks, it is enough that some run. A rank that does not run contributes to
    collectives, and returns, the same values as the next rank that runs. This saves time: the work of each rank grows
    with the number of ranks, so all ranks together take time quadratic in it.
    """

    def __init__(self, size: int, at_work: int | None = None) -> None:
        """`at_work`: number of ranks that run, evenly spaced from the first to the last; None for all."""
        self.size = size
        count = size if at_work is None else max(2, min(at_work, size))
        self.at_work = [round(place * (size - 1) / max(1, count - 1)) for place in range(count)]
        self._stands_for = [bisect.bisect_left(self.at_work, rank) for rank in range(size)]
        self._turn = threading.Lock()
        self._round = _Round()
        self._failed = False

    def run(self, work: Callable[[SimulatedRank], T]) -> tuple[list[T], list[SimulatedRank]]:
        """Run `work` on each rank; return its result for every rank, and the ranks that ran, with their counts.

        If ranks fail, raise the exception of the first.
        """
        ranks = [SimulatedRank(rank, self) for rank in self.at_work]
        results: dict[int, Any] = {}
        errors: list[BaseException] = []

        def on(rank: SimulatedRank) -> None:
            with self._turn, Counting(rank.counts):
                try:
                    results[rank.rank] = work(rank)
                except Abandoned:
                    pass
                except BaseException as error:
                    errors.append(error)
                    self._failed = True
                    self._round.over.set()

        threads = [threading.Thread(target=on, args=(rank,)) for rank in ranks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return [results[self.at_work[place]] for place in self._stands_for], ranks

    def meet(self, rank: int, value: Any, combine: Callable[[list[Any]], Any]) -> Any:
        """Wait until all ranks have given their values; return `combine` of the list of values, ordered by rank."""
        here = self._round
        here.values[rank] = value
        if len(here.values) == len(self.at_work):
            here.result = combine([here.values[self.at_work[place]] for place in self._stands_for])
            self._round = _Round()
            here.over.set()
            return here.result
        self._turn.release()
        here.over.wait()
        self._turn.acquire()
        if self._failed:
            raise Abandoned
        return here.result


class _Round:
    """State of one collective: values given so far, result, and the event that ends it."""

    def __init__(self) -> None:
        self.values: dict[int, Any] = {}
        self.result: Any = None
        self.over = threading.Event()


class SimulatedRank:
    """One rank of a World, used in place of `parallel.ranks.Ranks`.

    Objects are pickled, as between processes. Only the first and the last rank unpickle what they receive, because all
    others would do the same. So the CPU-seconds of the others are too low by that time.
    """

    device = torch.device("cpu")

    def __init__(self, rank: int, world: World) -> None:
        self.rank, self.world, self._world = rank, world.size, world
        self.first = rank == 0
        self.counts = Counts()
        self.phases = Phases()
        self.heard: list[bytes | list[bytes]] = []
        """Pickled results of the last rank's collectives, which `Again` replays to repeat its work alone."""

    def all_reduce_numbers(self, values: Sequence[float]) -> list[float]:
        self.counts.collectives += 1
        found = self._world.meet(
            self.rank, list(map(float, values)), lambda all_: list(map(sum, zip(*all_, strict=True)))
        )
        return self._heard(pickle.dumps(found))

    def all_gather_numbers(self, values: Sequence[float]) -> torch.Tensor:
        self.counts.collectives += 1
        self.counts.received_bytes += 8 * self.world * len(values)
        own = list(map(float, values))
        return self._world.meet(self.rank, own, lambda all_: torch.tensor(all_, dtype=torch.float64)).clone()

    def all_gather_object(self, value: T) -> list[T]:
        self.counts.collectives += 1
        blobs, values = self._world.meet(
            self.rank, pickle.dumps(value), lambda all_: (all_, list(map(pickle.loads, all_)))
        )
        self.counts.received_bytes += self.world * max(map(len, blobs))
        return self._heard(blobs) if self.rank in (0, self.world - 1) else values

    def broadcast_object(self, value: T) -> T:
        self.counts.collectives += 1
        blob, shared = self._world.meet(
            self.rank, pickle.dumps(value) if self.first else b"", lambda all_: (all_[0], pickle.loads(all_[0]))
        )
        self.counts.received_bytes += len(blob)
        return self._heard(blob) if self.rank in (0, self.world - 1) else shared

    def barrier(self) -> None:
        self.counts.collectives += 1
        self._world.meet(self.rank, None, lambda _: None)

    def _heard(self, what: bytes | list[bytes]) -> Any:
        if self.rank == self.world - 1:
            self.heard.append(what)
        return unpickled(what)


class Again:
    """A rank that repeats its work without the other ranks: its collectives return the recorded results."""

    device = torch.device("cpu")

    def __init__(self, before: SimulatedRank) -> None:
        self.rank, self.world, self.first = before.rank, before.world, before.first
        self.phases = Phases()
        self._heard = iter(before.heard)

    def all_reduce_numbers(self, _: Sequence[float]) -> list[float]:
        return unpickled(next(self._heard))

    def all_gather_object(self, _: T) -> list[T]:
        return unpickled(next(self._heard))

    def broadcast_object(self, _: T) -> T:
        return unpickled(next(self._heard))

    def barrier(self) -> None:
        return


def unpickled(what: bytes | list[bytes]) -> Any:
    """Unpickle one object or a list of objects."""
    return pickle.loads(what) if isinstance(what, bytes) else list(map(pickle.loads, what))


OWN_READING = "/proc/thread-self/io"
_counted: dict[int, Counts] = {}
_hooked = False


class Counting:
    """Context manager that counts what this thread does in `counts`. If nested, file opens count in the innermost."""

    def __init__(self, counts: Counts) -> None:
        global _hooked
        self.counts = counts
        if not _hooked:
            sys.addaudithook(_heard_of)  # an audit hook cannot be removed, so install it only once
            _hooked = True

    def __enter__(self) -> Counts:
        self._before = _counted.get(threading.get_ident())
        _counted[threading.get_ident()] = self.counts
        self._read = _read_so_far()
        self._cpu = time.thread_time()
        return self.counts

    def __exit__(self, *_: object) -> None:
        self.counts.cpu_s += time.thread_time() - self._cpu
        self.counts.read_bytes += _read_so_far() - self._read
        if self._before is None:
            del _counted[threading.get_ident()]
        else:
            _counted[threading.get_ident()] = self._before


def _heard_of(event: str, args: tuple[Any, ...]) -> None:
    if event == "open" and args[0] != OWN_READING and (counts := _counted.get(threading.get_ident())) is not None:
        counts.opens.append(os.fsdecode(args[0]) if isinstance(args[0], str | bytes | os.PathLike) else str(args[0]))


def _read_so_far() -> int:
    """Return the number of bytes that this thread has read so far, from any file."""
    text = Path(OWN_READING).read_text(encoding="ascii")
    return int(text.split("rchar: ")[1].split()[0]) - len(text)


class SyntheticState:
    """Weights and moments of synthetic parameters, sharded as a ZeRO stage does (a `checkpoint.snapshot.State`).

    Every value is a function of its parameter, kind and position, so any rank can check what it has loaded.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]], rank: int, ranks: int, stage: int, filled: bool) -> None:
        """`stage`: 1 or 3. `filled`: start with the right values, else with -1."""
        self._shapes, self.steps = shapes, 0
        runs = spread(shapes, rank, ranks) if stage == 3 else flat(shapes, rank, ranks)
        self._fragments = []
        for number, (name, shape) in enumerate(shapes.items()):
            begin, count = runs[name]
            if count:
                values = {kind: torch.full((count,), -1.0) for kind in (WEIGHT, *MOMENTS)}
                self._fragments.append(Fragment(Piece(name, shape, begin, count), values))
                if filled:
                    for kind, tensor in values.items():
                        tensor.copy_(self._right(number, kind, begin, count))
        self._number = {name: number for number, name in enumerate(shapes)}

    @staticmethod
    def _right(number: int, kind: str, begin: int, count: int) -> torch.Tensor:
        return torch.arange(begin, begin + count, dtype=torch.float32) + 1000 * number + len(kind) / 16

    def is_right(self) -> bool:
        """Whether all values are right."""
        return all(
            torch.equal(tensor, self._right(self._number[one.piece.name], kind, one.piece.begin, one.piece.count))
            for one in self._fragments
            for kind, tensor in one.values.items()
        )

    def held(self) -> list[Fragment]:
        return self._fragments

    owned = held

    def moments(self) -> dict[str, int]:
        """Return an empty dictionary: all parameters have both moments."""
        return {}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._shapes

    def updates(self) -> int:
        return self.steps

    def filled(self, step: int, updates: int) -> None:
        self.steps = updates


def spread(shapes: dict[str, tuple[int, ...]], rank: int, ranks: int) -> dict[str, tuple[int, int]]:
    """Return the first element and the count of this rank's part of every parameter, sharded as in ZeRO-3."""
    return {name: equal_part(torch.Size(shape).numel(), rank, ranks) for name, shape in shapes.items()}


def flat(shapes: dict[str, tuple[int, ...]], rank: int, ranks: int) -> dict[str, tuple[int, int]]:
    """Return the same as `spread` for ZeRO-1 and 2: one flat buffer of all parameters, cut into equal parts."""
    sizes = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    size = -(-sum(sizes.values()) // ranks)
    runs, position = {}, 0
    for name, count in sizes.items():
        first = min(max(rank * size - position, 0), count)
        last = min(max((rank + 1) * size - position, 0), count)
        runs[name] = first, last - first
        position += count
    return runs
