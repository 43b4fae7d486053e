"""The supervisor's reaction to the collective check of all ranks, and to hosts that are not ready for a restart."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import pytest

from bst_dist.cluster.controller import LaunchOptions
from bst_dist.cluster.hosts import Host, HostError
from bst_dist.cluster.preflight import PreflightError
from bst_dist.cluster.restarts import Restarts
from bst_dist.cluster.supervise import Job, Supervisor
from bst_dist.cluster.verdict import Ended
from bst_dist.report.metrics import FILE

HOSTS = [Host("a", 1), Host("b", 1)]


class Stub:
    """Stub of a controller: rank 1 of two ends with the given status."""

    def __init__(self, status: int) -> None:
        self.hosts, self.status, self.command = HOSTS, status, []

    def free_port(self, host: str) -> int:
        return 29500

    def address(self, host: str) -> str:
        return host

    def run(self, program, environment, placed) -> Ended:
        self.command = list(program)
        ended = Ended(2)
        ended.end(0, 0, 1.0)
        ended.end(1, self.status, 1.0)
        return ended


def rehearse(tmp_path: Path, status: int, accepted: list[str], stop_signals: Sequence[int] = ()) -> list[str]:
    """Return the command that all ranks were told to run."""
    job = Job(None, None, {}, None, accepted)
    stub = Stub(status)
    Supervisor(job, HOSTS, LaunchOptions("pdsh", tmp_path), Restarts(tmp_path, 0), stop_signals)._rehearse(stub)
    return stub.command


def test_ranks_that_fail_the_collective_check_prevent_the_start(tmp_path):
    rehearse(tmp_path, 0, [])
    with pytest.raises(PreflightError, match="rank 1 on b ended with status 1"):
        rehearse(tmp_path, 1, [])
    with pytest.raises(PreflightError):
        rehearse(tmp_path, 1, ["speed"])


def test_an_accepted_check_does_not_prevent_the_start(tmp_path):
    rehearse(tmp_path, 1, ["sum"])
    assert "--any-speed" in rehearse(tmp_path, 0, ["speed"])
    assert "--any-speed" not in rehearse(tmp_path, 0, ["sum"])


def test_a_stop_signal_during_the_check_prevents_the_start(tmp_path):
    with pytest.raises(PreflightError):
        rehearse(tmp_path, 75, ["sum"], stop_signals=[15])


def test_a_run_waits_for_hosts_that_are_not_ready_yet(tmp_path, monkeypatch):
    """A rank is killed; then no host is ready, then one is lost before its ranks start; the third restart succeeds."""
    (tmp_path / FILE).write_text(json.dumps({"kind": "train", "step": 7}) + "\n")
    job, options = Job(None, None, {}, None), LaunchOptions("pdsh", tmp_path)
    supervisor = Supervisor(job, HOSTS, options, Restarts(tmp_path, 5), [])
    comes = iter([None, HostError("b was lost before its ranks could be started"), Ended(2, {0: 0, 1: 0})])

    def again(ended: Ended) -> Ended | None:
        if isinstance(found := next(comes), HostError):
            raise found
        return found

    monkeypatch.setattr(supervisor, "_all_fit", lambda: nullcontext(Stub(0)))
    monkeypatch.setattr(supervisor, "_train", lambda *_: Ended(2, {0: -9}))
    monkeypatch.setattr(supervisor, "_again", again)
    monkeypatch.setattr(supervisor, "_wait", lambda seconds: None)
    assert supervisor.run().status == 0
    assert supervisor.restarts.total == 3
