"""The exit status of a job, the rank that is blamed, and whether the job is restarted."""

from __future__ import annotations

import pytest

from bst_dist.cluster.verdict import Ended, LeftAlone
from bst_dist.faults.status import DONE, FAILED, HUNG, RESUBMIT, USER_ERROR


@pytest.mark.parametrize(
    ("statuses", "status", "culprit", "again"),
    [
        ({0: 0, 1: 0, 2: 0}, DONE, None, False),
        ({0: 75, 1: 75, 2: 75}, RESUBMIT, None, False),
        ({0: 0, 1: 75, 2: 0}, RESUBMIT, None, False),
        ({0: 1, 1: -9, 2: 1}, 128 + 9, 1, True),  # the others fail because one was killed
        ({0: 70, 1: 1}, FAILED, 1, True),
        ({0: 70, 1: 70, 2: 70}, HUNG, 0, True),
        ({0: 1, 2: 2}, USER_ERROR, 2, False),  # it would end the same way
        ({0: 0, 1: 3}, 3, 1, True),
    ],
)
def test_rank_statuses_decide_exit_status_culprit_and_restart(statuses, status, culprit, again):
    ended = Ended(3, statuses)
    assert (ended.status, ended.culprit, ended.worth_a_restart) == (status, culprit, again)


@pytest.mark.parametrize(
    ("statuses", "when", "status", "culprit", "again"),
    [
        ({0: 1, 1: -6}, {0: 0.0, 1: 4.0}, FAILED, 0, True),  # NCCL aborts the peer of a rank that raised an error
        ({0: -6, 1: 1}, {0: 0.2, 1: 0.0}, FAILED, 1, True),  # also when both are seen in the same moment
        ({0: 2, 1: -6}, {0: 0.0, 1: 5.0}, USER_ERROR, 0, False),  # diverged: the others abort when rank 0 has ended
        ({0: -6, 1: 2}, {0: 0.0, 1: 5.0}, 128 + 6, 0, False),  # in any order, a restart would not help
        ({0: 1, 1: -9}, {0: 0.0, 1: 3.0}, FAILED, 0, True),  # killed because of the first failure
        ({0: 1, 1: -9}, {0: 0.0, 1: 0.9}, 128 + 9, 1, True),  # within one second, neither counts as first
        ({0: 1, 1: -9}, {0: 0.0, 1: 1.1}, FAILED, 0, True),
        ({0: -6, 1: 1}, {0: 0.0, 1: 0.9}, FAILED, 1, True),  # an abort may be noticed before its cause
        ({0: -6}, {0: 0.0}, 128 + 6, 0, True),
        ({0: 70, 1: 1}, {0: 0.0, 1: 0.5}, FAILED, 1, True),
    ],
)
def test_the_first_failure_is_the_culprit(statuses, when, status, culprit, again):
    ended = Ended(3, statuses, when)
    assert (ended.status, ended.culprit, ended.worth_a_restart) == (status, culprit, again)


@pytest.mark.parametrize(
    ("statuses", "settle_s"),
    [({0: 1}, 6.0), ({0: 1, 1: -9}, 1.0), ({0: -11}, 1.0), ({0: -6}, 6.0), ({0: 1, 1: -6}, 6.0), ({0: 0, 1: 75}, 6.0)],
)
def test_other_ranks_are_waited_for_unless_a_rank_was_killed(statuses, settle_s):
    """A rank that aborts (SIGABRT) has usually lost another rank, which may still report the cause."""
    assert Ended(3, statuses).settle_s == settle_s


@pytest.mark.parametrize(
    ("ended", "failed"),
    [
        (Ended(2), False),
        (Ended(2, {0: 0, 1: 75}), False),
        (Ended(2, {0: 0, 1: 3}), True),
        (Ended(2, {1: -9}), True),
        (Ended(2, {0: 75}, cut_short={1}), True),
        (Ended(2, lost={"node-02": "silent for 30 s"}), True),
    ],
)
def test_one_rank_or_host_that_fails_fails_the_job(ended, failed):
    assert ended.failed == failed


def test_ranks_that_stopped_without_a_launcher_are_restarted():
    ended = Ended(2, {0: 75, 1: 75}, left_alone={"node-02": LeftAlone(31.0, 5.0)})
    assert (ended.status, ended.worth_a_restart) == (RESUBMIT, True)
    assert "node-02 got no sign of life from this process for 31 s" in ended.explain({})
    assert not Ended(2, {0: 75, 1: 75}, left_alone={"node-02": LeftAlone(31.0, 5.0)}, stop_signal=15).worth_a_restart


def test_a_lost_host_is_the_cause_whatever_the_ranks_report():
    ended = Ended(3, {0: 1, 1: 1}, lost={"node-03": "silent for 30 s"})
    assert (ended.status, ended.worth_a_restart) == (FAILED, True)
    assert ended.explain({}) == "lost node-03: silent for 30 s"


def test_a_job_that_was_told_to_stop_is_not_restarted():
    assert not Ended(2, {0: -9}, stop_signal=15).worth_a_restart
    unfinished = Ended(2, {0: 75}, stop_signal=15)
    assert (unfinished.status, unfinished.worth_a_restart) == (RESUBMIT, False)
    assert Ended(2, {0: 75, 1: 75}, stop_signal=15).status == RESUBMIT
    assert Ended(2, {0: 75}, stop_signal=15, at_once=True).status == 130


@pytest.mark.parametrize(
    ("ended", "status"),
    [
        (Ended(2, {0: 75, 1: 75}), RESUBMIT),
        (Ended(2, {0: 0, 1: 0}), DONE),
        (Ended(2, cut_short={0, 1}), RESUBMIT),
        (Ended(2, {0: 75}, cut_short={1}), RESUBMIT),
        (Ended(2, {0: 74, 1: 74}), RESUBMIT),  # the last checkpoint could not be written
        (Ended(2, {0: 70, 1: 70}), RESUBMIT),
        (Ended(2, {0: 1, 1: -9}), RESUBMIT),
        (Ended(2, lost={"b": "silent for 30 s"}), RESUBMIT),
        (Ended(2, {0: 2, 1: 1}), USER_ERROR),  # diverged: a new start would too
    ],
)
def test_a_job_whose_agents_were_told_to_stop_is_left_to_the_scheduler(ended, status):
    """Slurm signals agents and ranks, and soon ends the job: restarted ranks would train until they are killed."""
    ended.told = {"b": 10}
    assert (ended.status, ended.worth_a_restart) == (status, False)


@pytest.mark.parametrize(
    ("statuses", "said"),
    [
        ({1: -9}, "rank 1 on node-02 was killed by SIGKILL (out of memory?)"),
        ({1: -11}, "rank 1 on node-02 was killed by SIGSEGV"),
        (
            {1: 70},
            "all ranks hung and the watchdog ended them (status 70); the first to end was rank 1 on node-02; the "
            "watchdog's message above says what blocked the job",
        ),
        ({0: 1}, "rank 0 on node-01 ended with status 1"),
        ({0: 2}, "rank 0 on node-01 ended with status 2 (a wrong setting, or the run diverged): see its message above"),
    ],
)
def test_the_culprit_is_named_with_its_host(statuses, said):
    assert Ended(2, statuses).explain({0: "node-01", 1: "node-02"}) == said
