"""Ranks that wait for their checkpoint: a slow one is written or read to its end, the watchdog ends a stuck one."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from bst_base.json_lines import read_lines
from bst_dist.checkpoint import agreement, saving
from bst_dist.checkpoint.agreement import read_together
from bst_dist.checkpoint.fragments import MOMENTS, WEIGHT, Fragment
from bst_dist.checkpoint.saving import Saved, Saver
from bst_dist.checkpoint.shards import Piece
from bst_dist.faults.config import WatchdogConfig
from bst_dist.faults.disks import Disks
from bst_dist.faults.heartbeats import LocalBoard
from bst_dist.faults.watchdog import Watchdog
from bst_dist.parallel.phases import Phases
from bst_dist.report.metrics import FILE
from bst_dist.train.run import train
from bst_dist.train.start.request import Request
from tests.checkpoint.alone import Alone

KINDS = ("weights", "optimizer")


class Together(Alone):
    """Stub of `Ranks` for one of several ranks that are threads of this process."""

    def __init__(self, rank: int, meeting: threading.Barrier, table: list[Any]) -> None:
        super().__init__()
        self.rank, self.world, self.first, self.phases = rank, len(table), rank == 0, Phases()
        self._meeting, self._table = meeting, table

    def all_gather_object(self, value: Any) -> list[Any]:
        with self.phases.exchanging("gather"):
            self._table[self.rank] = value
            self._meeting.wait(60)
            found = list(self._table)
            self._meeting.wait(60)
            return found

    def all_reduce_numbers(self, values: list[float]) -> list[float]:
        return [float(sum(column)) for column in zip(*self.all_gather_object(values), strict=True)]

    def broadcast_object(self, value: Any) -> Any:
        return self.all_gather_object(value)[0]


class Part:
    """A state of one tensor for each rank."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world = rank, world

    def owned(self) -> list[Fragment]:
        return [Fragment(Piece(f"a{self.rank}", (9,), 0, 9), {kind: torch.ones(9) for kind in (WEIGHT, *MOMENTS)})]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {f"a{rank}": (9,) for rank in range(self.world)}

    def moments(self) -> dict[str, int]:
        return {}


@pytest.fixture
def two(monkeypatch):
    """Two ranks; `of_rank_1` is called with each shard that rank 1 writes, before its content is written."""
    meeting, table = threading.Barrier(2), [None] * 2
    ranks = [Together(rank, meeting, table) for rank in (0, 1)]
    original = saving.write

    def write(file: Any, pieces: list[Piece], values: Any) -> int:
        if pieces[0].name.endswith("1"):
            of_rank_1[0](file)
        return original(file, pieces, values)

    of_rank_1: list[Callable[[Any], None]] = []
    monkeypatch.setattr(saving, "write", write)
    monkeypatch.setattr(saving, "SLICE_S", 0.02, raising=False)
    return ranks, of_rank_1.append


def save(ranks: list[Together], run_dir: Path, background: bool, tidy: Callable[[], None] = lambda: None) -> list[Any]:
    """Write a checkpoint on all ranks, and return their outcomes."""
    outcomes: list[Any] = [None] * len(ranks)

    def run(own: Together) -> None:
        saver = Saver(run_dir, Part(own.rank, own.world), own, background, tidy)
        own.phases.enter("checkpoint")
        outcomes[own.rank] = saver.start({"step": 1}, {}, KINDS) or saver.finish()

    threads = [threading.Thread(target=run, args=(own,)) for own in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return outcomes


@pytest.mark.parametrize("background", [True, False])
def test_ranks_exchange_while_the_files_of_one_of_them_grow(tmp_path, two, background):
    ranks, writes = two
    before, seen = [], []

    def slowly(file: Any) -> None:
        before.append(ranks[0].phases.exchanges)
        until = time.monotonic() + 20
        while time.monotonic() < until and ranks[0].phases.exchanges < before[0] + 8:
            file.write(b"x")
            time.sleep(0.01)
        seen.append(ranks[0].phases.exchanges - before[0])

    writes(slowly)
    assert all(isinstance(outcome, Saved) for outcome in save(ranks, tmp_path, background))
    assert seen[0] >= 8
    assert ranks[0].phases.exchanges == ranks[1].phases.exchanges


def test_ranks_exchange_while_old_checkpoints_are_removed(tmp_path, two):
    ranks, writes = two
    old, seen = tmp_path / "checkpoints" / "step-00000000.deleted", []
    old.mkdir(parents=True)
    for number in range(500):
        (old / str(number)).touch()

    def slowly() -> None:
        before = ranks[1].phases.exchanges
        for path in old.iterdir():
            if ranks[1].phases.exchanges < before + 8:
                time.sleep(0.03)
            path.unlink()
        seen.append(ranks[1].phases.exchanges - before)

    writes(lambda _: None)
    assert all(isinstance(outcome, Saved) for outcome in save(ranks, tmp_path, True, slowly))
    assert seen[0] >= 8
    assert ranks[0].phases.exchanges == ranks[1].phases.exchanges


@contextmanager
def watched(ranks: list[Together], run_dir: Path) -> Iterator[tuple[dict[int, str], threading.Event]]:
    """Let a watchdog watch each rank; yield what each says when it would end its rank, and whether one has."""
    said: dict[int, str] = {}
    ended, board = threading.Event(), LocalBoard()

    def end_of(rank: int) -> Callable[..., None]:
        def end(status: int, message: str, stacks: bool = False) -> None:
            said[rank] = message
            ended.set()

        return end

    with ExitStack() as dogs:
        for own in ranks:
            dogs.enter_context(
                Watchdog(
                    WatchdogConfig(limit_s=4),
                    run_dir,
                    own.rank,
                    len(ranks),
                    own.phases,
                    board,
                    Disks(),
                    end_of(own.rank),
                )
            )
        yield said, ended


def test_the_watchdog_ends_a_rank_whose_files_do_not_grow_and_names_it(tmp_path, two):
    ranks, writes = two
    with watched(ranks, tmp_path) as (said, ended):
        writes(lambda _: ended.wait(60))
        save(ranks, tmp_path, background=True)
    assert "rank 1 on" in said[0].splitlines()[1]
    assert "behind the others" in said[0].splitlines()[1]
    assert "checkpoint" in said[0].splitlines()[1]


def read(ranks: list[Together], slowly: Callable[[Callable[[], None]], Any]) -> list[Any]:
    """Let rank 1 read `slowly`, and return the results of all ranks."""
    found: list[Any] = [None] * len(ranks)

    def run(own: Together) -> None:
        found[own.rank] = read_together(own, slowly if own.rank == 1 else lambda _: "at once")

    threads = [threading.Thread(target=run, args=(own,)) for own in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return found


def test_ranks_exchange_while_one_of_them_reads(two, monkeypatch):
    ranks, _ = two
    monkeypatch.setattr(agreement, "SLICE_S", 0.02)

    def slowly(arrived: Callable[[], None]) -> str:
        until = time.monotonic() + 20
        while time.monotonic() < until and ranks[0].phases.exchanges < 8:
            time.sleep(0.01)
            arrived()
        return "in the end"

    assert read(ranks, slowly) == [["at once", "in the end"]] * 2
    assert ranks[0].phases.exchanges == ranks[1].phases.exchanges >= 8


def test_the_watchdog_ends_a_rank_whose_reading_stands_still_and_names_it(tmp_path, two):
    ranks, _ = two
    with watched(ranks, tmp_path) as (said, ended):
        read(ranks, lambda _: ended.wait(60))
    assert "rank 1 on" in said[0].splitlines()[1]
    assert "behind the others" in said[0].splitlines()[1]


@pytest.mark.ranks
@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("reads", ["digests", "tensors"])
def test_a_run_resumes_though_reading_takes_longer_than_the_watchdog_waits(
    reads, recipe_file, on_ranks, tmp_path, monkeypatch
):
    def go(resume: bool, until: int) -> None:
        request = Request(recipe_file(), ["watchdog.limit_s=4"], tmp_path / "run", resume, until)
        on_ranks(2, lambda ranks: train(request, ranks))

    go(resume=False, until=2)
    readinto, taken_s = io.FileIO.readinto, 14.0

    class Slow(io.FileIO):
        """A file that gives a byte, then nothing for a moment, and so on, until the time is over."""

        def readinto(self, buffer: Any) -> int:
            if time.monotonic() > begun + taken_s:
                return readinto(self, buffer)
            time.sleep(0.2)
            return readinto(self, memoryview(buffer)[:4])

    def opened(path: Path, mode: str = "r", buffering: int = -1, **others: Any) -> Any:
        if path.suffix != ".safetensors" or mode != "rb" or (buffering == 0) != (reads == "tensors"):
            return plain(path, mode, buffering, **others)
        return Slow(path)

    plain, begun = Path.open, time.monotonic()
    monkeypatch.setattr(agreement, "SLICE_S", 0.5)
    monkeypatch.setattr(Path, "open", opened)
    go(resume=True, until=3)
    assert time.monotonic() > begun + taken_s
    assert [line["step"] for line in read_lines(tmp_path / "run" / FILE) if line["kind"] == "train"] == [1, 2, 3]
