"""A job that stands still is ended, and the rank that holds it up is named."""

from __future__ import annotations

import os
import signal
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from bst_dist.faults.config import WatchdogConfig
from bst_dist.faults.status import HUNG
from bst_dist.faults.watchdog import STACKS, Heartbeat, Watchdog, judge
from bst_dist.parallel.phases import Phases
from bst_dist.train.run import train
from bst_dist.train.start import Request
from bst_dist.train.step import Trainer


def beat(rank: int, beats: int = 1, entered: int = 5, exchanges: int = 9, phase: str = "backward") -> Heartbeat:
    return Heartbeat(rank, f"node-{rank}", 100 + rank, beats, 3, phase, entered, "all-reduce", exchanges)


def later(beats: list[Heartbeat]) -> list[Heartbeat]:
    return [replace(one, beats=one.beats + 1) for one in beats]


def test_a_rank_whose_file_stays_the_same_is_silent_and_the_first_other_one_speaks():
    beats = [beat(0), beat(1), beat(2)]
    speaker, lines = judge(beats, [beats[0], *later(beats[1:])])
    assert speaker == 1
    assert lines[0].startswith("rank 0 on node-0 (pid 100): silent")
    assert "2 of 3 ranks wait" in lines[1]
    assert judge([beats[0], None], [later(beats[:1])[0], None])[1][0] == "rank 1: silent"


def test_the_ranks_that_are_behind_hold_up_the_others():
    in_data, in_exchange = beat(1, entered=4, phase="data"), beat(2, exchanges=7)
    beats = [beat(0), in_data, in_exchange, beat(3)]
    _, lines = judge(beats, later(beats))
    assert [line.partition(":")[0] for line in lines[:2]] == [
        "rank 1 on node-1 (pid 101)",
        "rank 2 on node-2 (pid 102)",
    ]
    assert "step 3, data" in lines[0]
    assert lines[2].startswith(
        "2 of 4 ranks wait, the first of them in step 3, backward; last exchange begun: all-reduce"
    )


def test_ranks_at_the_same_place_suspect_the_network_and_a_rank_alone_itself():
    beats = [beat(0), beat(1)]
    assert "does the network let them through" in judge(beats, later(beats))[1][0]
    assert judge(beats[:1], later(beats[:1]))[1] == [f"{beats[0].name()}: in {beats[0].describe()}"]


def test_a_rank_that_moves_between_the_readings_is_only_slow():
    beats = [beat(0), beat(1)]
    assert judge(beats, [*later(beats[:1]), beat(1, beats=2, exchanges=10)]) is None


@pytest.mark.parametrize("frozen", [True, False])
def test_watchdogs_of_several_ranks_agree_on_the_culprit_and_leave_stacks(tmp_path, capfd, frozen):
    ended = {rank: threading.Event() for rank in (0, 1)}
    statuses: list[int] = []

    def end(rank: int, status: int) -> None:
        statuses.append(status)
        ended[rank].set()

    phases = [Phases(), Phases()]
    dogs = [Watchdog(WatchdogConfig(limit_s=0.4), tmp_path, rank, 2, phases[rank], lambda s, r=rank: end(r, s))
            for rank in (0, 1)]  # fmt: skip
    with dogs[0], dogs[1]:
        phases[1].enter("forward", step=7)
        phases[0].enter("forward", step=7)
        phases[1].enter("backward")
        if frozen:
            dogs[1]._closed.set()  # its thread ends, as if the process stood still
        assert ended[0].wait(20)
        assert frozen or ended[1].wait(20)
    said = capfd.readouterr().err
    assert said.count("no rank has moved for") >= 1
    assert ("rank 1 on" in said) == frozen
    assert ("silent" in said) == frozen
    assert ("rank 0 on" in said and "behind the others, in step 7, forward" in said) != frozen
    assert set(statuses) == {HUNG}
    stacks = (tmp_path / STACKS / "rank-00000.txt").read_text()
    assert "test_watchdogs_of_several_ranks" in stacks
    assert "no rank has moved for" in stacks


def test_a_rank_that_goes_on_slowly_is_left_alone(tmp_path):
    ended = threading.Event()
    phases = Phases()
    with Watchdog(WatchdogConfig(limit_s=0.5), tmp_path, 0, 1, phases, lambda _: ended.set()):
        for _ in range(8):
            with phases.exchanging("sum"):
                assert not ended.wait(0.2)
    with Watchdog(WatchdogConfig(limit_s=0), tmp_path, 0, 1, phases, lambda _: ended.set()):
        assert not ended.wait(0.2)


@pytest.mark.ranks
def test_a_stopped_process_is_named_by_the_other_rank_which_ends(
    recipe_file, tmp_path, on_ranks, unmeasured, monkeypatch, capfd
):
    recipe = recipe_file(watchdog={"limit_s": 3})
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
