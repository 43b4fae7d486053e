"""A job that hangs is ended, and the rank that causes it is named."""

from __future__ import annotations

import os
import pickle
import signal
import threading
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.distributed import PrefixStore, TCPStore

from bst_dist.faults.config import WatchdogConfig
from bst_dist.faults.disks import Disks
from bst_dist.faults.heartbeats import (
    Heartbeat,
    LocalBoard,
    StoreBoard,
    find_blocking_ranks,
    from_json,
    key_of,
    to_json,
)
from bst_dist.faults.stacks import RECORDER, STACKS
from bst_dist.faults.status import HUNG
from bst_dist.faults.watchdog import LONGEST_SILENCE_S, Watchdog
from bst_dist.parallel.phases import Phases
from bst_dist.train.run import train
from bst_dist.train.start.request import Request
from bst_dist.train.step import Trainer


def beat(rank: int, beats: int = 1, entered: int = 5, exchanges: int = 9, phase: str = "backward") -> Heartbeat:
    return Heartbeat(
        rank=rank,
        host=f"node-{rank}",
        pid=100 + rank,
        beats=beats,
        step=3,
        phase=phase,
        entered=entered,
        exchange="all-reduce",
        exchanges=exchanges,
        still_s=75.0,
    )


def later(beats: list[Heartbeat]) -> list[Heartbeat]:
    return [replace(one, beats=one.beats + 1) for one in beats]


def test_a_rank_whose_heartbeat_does_not_change_is_silent():
    beats = [beat(0), beat(1), beat(2)]
    lines = find_blocking_ranks(beats, [beats[0], *later(beats[1:])])
    assert lines[0].startswith("rank 0 on node-0 (pid 100): silent")
    assert "2 of 3 ranks wait" in lines[1]
    assert find_blocking_ranks([beats[0], None], [later(beats[:1])[0], None])[0] == "rank 1: silent"


def test_ranks_behind_the_others_are_named():
    in_data, in_exchange = beat(1, entered=4, exchanges=8, phase="data"), beat(2, exchanges=7)
    beats = [beat(0), in_data, in_exchange, beat(3)]
    lines = find_blocking_ranks(beats, later(beats))
    assert [line.partition(":")[0] for line in lines[:2]] == [
        "rank 1 on node-1 (pid 101)",
        "rank 2 on node-2 (pid 102)",
    ]
    assert "for 75 s in step 3, data" in lines[0]
    assert lines[2].startswith(
        "2 of 4 ranks wait, the first of them in step 3, backward; last exchange begun: all-reduce"
    )


def test_ranks_that_entered_phases_as_often_as_their_data_needs_are_not_behind():
    """With slices, ranks skip different passes. Rank 3 hangs in a read; after many steps the others differ, too."""
    beats = [
        beat(0, entered=1000, exchanges=500),
        beat(1, entered=1040, exchanges=500),
        beat(2, entered=1000, exchanges=500),
        beat(3, entered=1002, exchanges=499, phase="data"),
    ]
    lines = find_blocking_ranks(beats, later(beats))
    assert [line.partition(" on ")[0] for line in lines] == ["rank 3", lines[1].partition(" on ")[0]]
    assert lines[1].startswith("3 of 4 ranks wait")
    healthy = [replace(one, exchanges=500) for one in beats]
    assert "does the network let them through" in find_blocking_ranks(healthy, later(healthy))[0]


def test_the_network_is_suspected_when_all_ranks_are_at_one_place():
    beats = [beat(0), beat(1)]
    assert "does the network let them through" in find_blocking_ranks(beats, later(beats))[0]
    assert find_blocking_ranks(beats[:1], later(beats[:1])) == [f"{beats[0].name()}: for 75 s in {beats[0].describe()}"]


def test_directories_that_do_not_answer_are_named_once_with_their_hosts():
    beats = [replace(beat(rank), disks={"/runs/a": 40.0 + rank}) for rank in range(6)]
    assert find_blocking_ranks(beats, later(beats))[-1] == (
        "the file system hangs: /runs/a has not answered for 45 s on node-0, node-1, node-2, node-3 and 2 more hosts"
    )


def test_a_rank_that_moves_between_two_readings_is_not_hanging():
    beats = [beat(0), beat(1)]
    assert find_blocking_ranks(beats, [*later(beats[:1]), beat(1, beats=2, exchanges=10)]) is None


def test_the_watchdog_limit_is_shorter_than_the_collective_timeout():
    for limit_s in (1.0, 20.0, WatchdogConfig().limit_s, 7200.0):
        config = WatchdogConfig(limit_s=limit_s)
        assert config.exchange_limit_s > config.limit_s + 2 * LONGEST_SILENCE_S
    assert WatchdogConfig().limit_s + 2 * LONGEST_SILENCE_S < 600  # torch's and DeepSpeed's own limit
    assert WatchdogConfig(limit_s=0).exchange_limit_s is None


def test_all_ranks_read_a_shared_board_and_missing_entries_are_none():
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30))
    other = TCPStore("127.0.0.1", store.port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=30))
    one, two = (StoreBoard(PrefixStore("x", each)) for each in (store, other))
    one.put(key_of(0), to_json(beat(0)))
    assert two.get([key_of(0), key_of(1)])[1] is None
    two.put(key_of(1), to_json(beat(1)))
    assert [*map(from_json, one.get([key_of(0), key_of(1)]))] == [beat(0), beat(1)]
    assert from_json("{") is None


class Ends:
    """Records messages and exit statuses with which the watchdogs of several ranks end."""

    def __init__(self, ranks: int) -> None:
        self.said: dict[int, str] = {}
        self.statuses: set[int] = set()
        self.ended = [threading.Event() for _ in range(ranks)]

    def of(self, rank: int):
        def end(status: int, message: str, stacks: bool = False) -> None:
            self.statuses.add(status)
            self.said[rank] = message
            self.ended[rank].set()

        return end


class Deaf(LocalBoard):
    """A board that stops answering, like the store of a process that hangs."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = threading.Event()

    def put(self, key: str, text: str) -> None:
        if self.frozen.is_set():
            threading.Event().wait(60)
        super().put(key, text)


def watch(tmp_path: Path, rank: int, phases: Phases, board: LocalBoard, ends: Ends, limit_s: float = 0.8) -> Watchdog:
    return Watchdog(WatchdogConfig(limit_s=limit_s), tmp_path, rank, 2, phases, board, Disks(), ends.of(rank))


def test_watchdogs_of_several_ranks_agree_on_the_rank_that_is_behind_and_leave_stacks(tmp_path):
    ends, board, phases = Ends(2), LocalBoard(), [Phases(), Phases()]
    with watch(tmp_path, 0, phases[0], board, ends, 4), watch(tmp_path, 1, phases[1], board, ends, 4):
        phases[1].enter("forward", step=7)
        phases[0].enter("forward", step=7)
        phases[0].enter("backward")
        with phases[0].exchanging("all-reduce"):
            assert all(ended.wait(60) for ended in ends.ended)
    assert "bst train: no rank has moved for" in ends.said[0]
    assert "rank 1 on" in ends.said[0]
    assert "behind the others, for" in ends.said[0]
    assert ends.said[1] == ""  # rank 0 has already printed it
    assert ends.statuses == {HUNG}
    stacks = (tmp_path / STACKS / "rank-00000.txt").read_text()
    assert "test_watchdogs_of_several_ranks" in stacks
    assert (tmp_path / STACKS / RECORDER / "rank_1").exists()


def test_a_frozen_rank_is_named_by_rank_0_and_a_frozen_rank_0_by_the_others(tmp_path):
    for frozen in (0, 1):
        ends, board, phases = Ends(2), LocalBoard(), Phases()
        board.put(key_of(frozen), to_json(beat(frozen)))  # its last heartbeat
        with watch(tmp_path, 1 - frozen, phases, board, ends):
            assert ends.ended[1 - frozen].wait(60)
        assert f"rank {frozen} on node-{frozen} (pid 10{frozen}): silent" in ends.said[1 - frozen]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_hanging_board_does_not_prevent_the_exit(tmp_path, rank):
    ends, board = Ends(2), Deaf()
    board.put(key_of(0), to_json(beat(0)))
    board.put(key_of(1), to_json(beat(1)))
    with watch(tmp_path, rank, Phases(), board, ends):
        time.sleep(0.3)
        board.frozen.set()
        assert ends.ended[rank].wait(60)
    assert ("rank 0 on" in ends.said[1] and "silent" in ends.said[1]) if rank else "does not answer" in ends.said[0]


def test_a_slow_rank_is_not_ended(tmp_path, monkeypatch):
    """With a clock that the test sets: each exchange takes three quarters of the limit."""
    ends, board, phases = Ends(1), LocalBoard(), Phases()
    now = [time.monotonic()]
    monkeypatch.setattr("bst_dist.faults.watchdog.time", SimpleNamespace(monotonic=lambda: now[0]))
    with Watchdog(WatchdogConfig(limit_s=2), tmp_path, 0, 1, phases, board, Disks(), ends.of(0)) as watchdog:
        for _ in range(6):
            with phases.exchanging("sum"):
                while watchdog._still_since != now[0]:
                    assert not ends.ended[0].wait(0.02)
                now[0] += 1.5
        assert not ends.ended[0].wait(0.5)
    with Watchdog(WatchdogConfig(limit_s=0), tmp_path, 0, 1, phases, board, Disks(), ends.of(0)):
        assert not ends.ended[0].wait(0.2)


@pytest.mark.ranks
def test_a_stopped_process_is_named_by_the_other_rank_which_ends(
    recipe_file, tmp_path, on_ranks, unmeasured, monkeypatch, capfd
):
    recipe = recipe_file(watchdog={"limit_s": 10})
    original = Trainer._accumulate

    def stopped(self: Trainer, step: int, *args: object) -> object:
        if self.ranks.rank == 1 and step == 2:
            (tmp_path / "pid").write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGSTOP)
        return original(self, step, *args)

    monkeypatch.setattr(Trainer, "_accumulate", stopped)
    run: Path = tmp_path / "run"
    with pytest.raises(AssertionError, match="rank 0 died without a word"):
        on_ranks(2, lambda ranks: train(Request(recipe, [], run, False, None), ranks))
    said = capfd.readouterr().err
    assert f"(pid {(tmp_path / 'pid').read_text()}): silent" in said
    assert "it was in step 3, optimizer" not in said
    assert "bst train: no rank has moved for" in said
    assert "_accumulate" in (run / STACKS / "rank-00000.txt").read_text()
    record = pickle.loads((run / STACKS / RECORDER / "rank_0").read_bytes())
    assert record["entries"]
