"""When a failed run is restarted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bst_dist.checkpoint.directory import CHECKPOINTS, MANIFEST, directory
from bst_dist.cluster.restarts import Restarts
from bst_dist.cluster.verdict import Ended
from bst_dist.report.metrics import FILE

KILLED, REFUSED, UNREADABLE = Ended(1, {0: -9}), Ended(1, {0: 2}), Ended(1, {0: 74})
LOST = Ended(2, lost={"node-02": "silent for 30 s"})


def reach(run_dir: Path, step: int, saved: int | None = None) -> None:
    """Write metrics of `step` steps and, if `saved` is given, a checkpoint of that step."""
    (run_dir / FILE).write_text("".join(json.dumps({"kind": "train", "step": n}) + "\n" for n in range(1, step + 1)))
    if saved is not None:
        directory(run_dir, saved).mkdir(parents=True)
        (directory(run_dir, saved) / MANIFEST).write_text("{}")


def test_a_new_checkpoint_resets_the_restart_count(tmp_path):
    restarts = Restarts(tmp_path, most=2)
    for number in range(1, 6):  # many failures, each after some progress
        reach(tmp_path, 10 * number + 3, saved=10 * number)
        assert restarts.refuse(KILLED) is None
        assert restarts.used == 1
    for step in (54, 55):
        reach(tmp_path, step)
        refusal = restarts.refuse(KILLED)
    assert refusal == "2 restarts without a new checkpoint (--max-restarts)"
    assert restarts.total == 6


def test_a_first_checkpoint_at_step_1_resets_the_restart_count(tmp_path):
    restarts = Restarts(tmp_path, most=1)
    assert restarts.refuse(LOST) is None
    reach(tmp_path, 1, saved=1)
    assert restarts.refuse(LOST) is None
    assert restarts.refuse(LOST) == "1 restarts without a new checkpoint (--max-restarts)"


def test_two_failures_after_the_same_step_end_the_restarts(tmp_path):
    restarts = Restarts(tmp_path, most=100)
    reach(tmp_path, 7, saved=5)
    assert restarts.refuse(KILLED) is None
    assert restarts.refuse(Ended(1, {0: 1})).startswith("failed twice after step 7 with all hosts available")


def test_hosts_may_be_lost_repeatedly_at_the_same_step(tmp_path):
    restarts = Restarts(tmp_path, most=3)
    assert [restarts.refuse(LOST) for _ in range(3)] == [None] * 3
    assert restarts.refuse(LOST)


def test_a_file_system_that_fails_is_waited_for_and_retried(tmp_path):
    restarts = Restarts(tmp_path, most=3)
    reach(tmp_path, 7, saved=5)
    for _ in range(3):
        assert restarts.refuse(UNREADABLE) is None
        assert restarts.wait_s == 60
    assert restarts.refuse(UNREADABLE) == "3 restarts without a new checkpoint (--max-restarts)"


@pytest.mark.parametrize("at_the_start", [False, True])
def test_a_run_directory_that_cannot_be_read_is_waited_for_and_is_no_progress(tmp_path, at_the_start):
    """The checkpoint is as old before the outage as after it: the count of restarts goes on."""
    reach(tmp_path, 7, saved=5)
    shown, hidden = tmp_path / CHECKPOINTS, tmp_path / "hidden"

    def break_off() -> None:
        shown.rename(hidden)
        shown.touch()  # listing it is an error, also for root

    if at_the_start:
        break_off()
    restarts = Restarts(tmp_path, most=3)
    if not at_the_start:
        break_off()
    assert [restarts.refuse(UNREADABLE) for _ in range(2)] == [None, None]
    shown.unlink()
    hidden.rename(shown)
    assert restarts.refuse(UNREADABLE) is None
    assert restarts.used == 3
    reach(tmp_path, 9, saved=8)
    assert restarts.refuse(KILLED) is None
    assert restarts.used == 1


def test_an_attempt_that_started_nothing_is_not_a_second_failure(tmp_path):
    restarts = Restarts(tmp_path, most=3)
    reach(tmp_path, 7, saved=5)
    assert restarts.refuse(KILLED) is None
    assert restarts.refuse(KILLED, started=False) is None
    assert restarts.refuse(KILLED) is None


def test_waits_grow_while_there_is_no_progress(tmp_path):
    restarts, waits = Restarts(tmp_path, most=8), []
    while restarts.refuse(LOST) is None:
        waits.append(restarts.wait_s)
    assert waits == [0, 5, 10, 20, 40, 60, 60, 60]


@pytest.mark.parametrize("ended", [REFUSED, Ended(1, {0: 0}), Ended(1, {0: 75}), Ended(1, {0: -9}, stop_signal=15)])
def test_permanent_errors_and_requested_stops_are_not_restarted(tmp_path, ended):
    assert Restarts(tmp_path, most=5).refuse(ended) == ""


def test_a_failure_after_a_signal_to_the_agents_is_not_restarted_and_the_signal_is_named(tmp_path):
    ended = Ended(2, cut_short={0, 1}, told={"node-02": 10})
    assert Restarts(tmp_path, most=5).refuse(ended) == "node-02 was told to stop (SIGUSR1)"
    assert Restarts(tmp_path, most=0).refuse(ended) == ""


def test_zero_allowed_restarts_refuse_without_a_message(tmp_path):
    assert Restarts(tmp_path, most=0).refuse(KILLED) == ""
