"""The supervisor's reaction to the collective check of all ranks, and to hosts that are not ready for a restart."""

from __future__ import annotations

import json
import signal
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from bst_base.stopping import Stopped
from bst_dist.cluster.controller import LaunchOptions
from bst_dist.cluster.elastic import Shape
from bst_dist.cluster.hosts import Host, HostError
from bst_dist.cluster.preflight import Needs, PreflightError
from bst_dist.cluster.processes import StopSignals
from bst_dist.cluster.restarts import Restarts
from bst_dist.cluster.space import Space
from bst_dist.cluster.supervise import Job, Supervisor
from bst_dist.cluster.verdict import Ended
from bst_dist.faults.status import FAILED, RESUBMIT, USER_ERROR
from bst_dist.report.metrics import FILE
from bst_dist.train.rundir import ENVIRONMENT
from bst_dist.train.start.request import Request
from tests.cluster.listed_checkpoint import write_checkpoint

HOSTS = [Host("a", 1), Host("b", 1)]


class Stub:
    """Stub of a controller: rank 1 of two ends with the given status."""

    def __init__(self, status: int, told: dict[str, int] | None = None) -> None:
        self.hosts, self.status, self.command, self.told = HOSTS, status, [], told or {}

    def listen(self, seconds: float) -> None:
        return

    def free_port(self, host: str) -> int:
        return 29500

    def address(self, host: str) -> str:
        return host

    def run(self, program, environment, placed, notice="") -> Ended:
        self.command = list(program)
        ended = Ended(2, told=self.told)
        ended.end(0, 0, 1.0)
        ended.end(1, self.status, 1.0)
        return ended


def rehearse(
    tmp_path: Path,
    status: int,
    accepted: list[str],
    stop_signal: int | None = None,
    told: dict[str, int] | None = None,
) -> list[str]:
    """Return the command that all ranks were told to run."""
    job = Job(None, None, {}, None, accepted)
    stub = Stub(status, told)
    stop_signals = StopSignals(stop_signal)
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
    with pytest.raises(Stopped, match=r"told to stop \(SIGTERM\) while no rank of the run was running"):
        rehearse(tmp_path, -15, ["sum"], stop_signal=15)


@pytest.mark.parametrize("status", [-signal.SIGUSR1, -signal.SIGTERM, 0])
def test_a_signal_of_the_scheduler_to_agents_and_ranks_is_a_stop(tmp_path, status):
    """Slurm signals the processes of a job's steps, and not the batch script that `bst launch` runs in."""
    with pytest.raises(Stopped, match=r"b was told to stop \(SIGUSR1\) while no rank of the run was running"):
        rehearse(tmp_path, status, [], told={"b": signal.SIGUSR1})
    if status:
        with pytest.raises(PreflightError, match="rank 1 on b was killed by SIG"):
            rehearse(tmp_path, status, [])


@pytest.mark.parametrize("error", [PreflightError("not started: fix b"), HostError("b was lost")])
@pytest.mark.parametrize("stop_signal", [None, signal.SIGUSR1])
def test_a_signal_before_the_first_start_is_a_stop_whatever_it_interrupts(tmp_path, monkeypatch, error, stop_signal):
    supervisor = Supervisor(
        Job(None, None, {}, None),
        HOSTS,
        LaunchOptions("pdsh", tmp_path),
        Restarts(tmp_path, 0),
        StopSignals(stop_signal),
    )

    def interrupted(*_: object) -> None:
        raise error

    monkeypatch.setattr("bst_dist.cluster.preflight.require_reachable", interrupted)
    for started in (supervisor.run, supervisor.check):
        with pytest.raises(Stopped if stop_signal else type(error)) as raised:
            started()
        assert raised.value.exit_status == (RESUBMIT if stop_signal else USER_ERROR)


def test_a_signal_between_two_starts_is_a_stop(tmp_path, monkeypatch):
    """Not the failure before it: the run would have been started again."""
    stop_signals = StopSignals()
    monkeypatch.setattr("bst_dist.cluster.supervise.Controller", None)  # nothing is started
    supervisor = Supervisor(
        Job(None, None, {}, None), HOSTS, LaunchOptions("slurm", tmp_path), Restarts(tmp_path, 5), stop_signals
    )
    monkeypatch.setattr(supervisor, "_all_fit", lambda: nullcontext(Stub(0)))
    monkeypatch.setattr(supervisor, "_train", lambda *_: Ended(2, {0: -9}))
    monkeypatch.setattr(supervisor, "_wait", lambda seconds: setattr(stop_signals, "first", signal.SIGTERM))
    with pytest.raises(Stopped, match="no rank of the run was running"):
        supervisor.run()


def test_a_lost_host_is_named_once(tmp_path, monkeypatch, capsys):
    """The controller names it when it notices."""
    job, options = Job(None, None, {}, None), LaunchOptions("pdsh", tmp_path)
    supervisor = Supervisor(job, HOSTS, options, Restarts(tmp_path, 0), StopSignals())
    monkeypatch.setattr("bst_dist.cluster.supervise.choose", lambda *_: Shape(2, 1))
    monkeypatch.setattr("bst_dist.cluster.supervise._laid_out", lambda asked, *_: asked)
    monkeypatch.setattr("bst_dist.cluster.supervise.program", lambda asked: [])
    stub = Stub(0)
    monkeypatch.setattr(stub, "run", lambda *_: Ended(2, lost={"b": "silent for 30 s"}))
    assert supervisor._train(stub, None).status == FAILED
    assert "lost b" not in capsys.readouterr().err
    monkeypatch.setattr(stub, "run", lambda *_: Ended(2, {1: -9}))
    supervisor._train(stub, None)
    assert "rank 1 on b was killed by SIGKILL" in capsys.readouterr().err


class Restart:
    """A supervisor of a run that has failed, which records what a restart asks the hosts for, and its request."""

    def __init__(self, job: Job, tmp_path: Path, monkeypatch) -> None:
        self.needs: list[Needs] = []
        self.asked: list[Request] = []
        supervisor = Supervisor(job, HOSTS, LaunchOptions("slurm", tmp_path), Restarts(tmp_path, 1), StopSignals())
        monkeypatch.setattr("bst_dist.cluster.supervise.Controller", lambda *_: nullcontext(Stub(0)))
        monkeypatch.setattr("bst_dist.cluster.preflight.examine", lambda _, needs, __: self.needs.append(needs) or [])
        monkeypatch.setattr(supervisor, "_train", lambda _, asked: self.asked.append(asked) or Ended(1, {0: 0}))
        self.supervisor = supervisor

    def start(self) -> None:
        assert self.supervisor._again(Ended(1, {0: -9})).status == 0


def test_a_restart_needs_space_for_one_checkpoint_if_the_run_has_one(tmp_path, monkeypatch):
    """A run whose own checkpoints fill the disk could not be restarted otherwise."""
    needs = Needs([], tmp_path, Space(2, 32_000), 1000)
    restart = Restart(Job(Request(Path("r.yaml"), [], tmp_path, False, None), None, {}, needs), tmp_path, monkeypatch)
    restart.start()
    write_checkpoint(tmp_path, 10, {"weights-00000.safetensors": 1000, "optimizer-00000.safetensors": 2000})
    restart.start()
    assert restart.needs == [needs, replace(needs, space=Space(1, 3000))]


def test_a_run_is_begun_from_zero_once(tmp_path, monkeypatch):
    """A start that failed earlier, for example because a rank did not connect, has not begun the run anew."""
    environment = tmp_path / ENVIRONMENT

    def record(*from_steps: int) -> None:
        environment.write_text(json.dumps({"starts": [{"from_step": step} for step in from_steps]}))

    record(0, 80)
    asked = Request(Path("r.yaml"), [], tmp_path, False, None, from_zero=True)
    job = Job(asked, None, {}, Needs([], tmp_path, Space(2, 32_000), 1000))
    restart = Restart(job, tmp_path, monkeypatch)
    restart.start()
    record(0, 80, 0)
    restart.start()
    environment.unlink()
    environment.mkdir()  # reading it is an error, also for root
    restart.start()
    assert [(asked.resume, asked.from_zero) for asked in restart.asked] == [(True, True), (True, False), (True, False)]


@pytest.mark.parametrize("status", [-signal.SIGUSR1, 74])
def test_a_failure_of_training_after_a_signal_of_the_scheduler_is_left_to_it(tmp_path, monkeypatch, status):
    """The agent's report of the signal may arrive after that of a rank, which the signal kills while it starts."""
    job, options = Job(None, None, {}, None), LaunchOptions("slurm", tmp_path)
    supervisor = Supervisor(job, HOSTS, options, Restarts(tmp_path, 3), StopSignals())
    monkeypatch.setattr("bst_dist.cluster.supervise.choose", lambda *_: Shape(2, 1))
    monkeypatch.setattr("bst_dist.cluster.supervise._laid_out", lambda asked, *_: asked)
    monkeypatch.setattr("bst_dist.cluster.supervise.program", lambda asked: [])
    stub = Stub(status)
    if status < 0:
        monkeypatch.setattr(stub, "listen", lambda seconds: stub.told.update(b=signal.SIGUSR1))
    else:
        stub.told["b"] = signal.SIGUSR1
    monkeypatch.setattr(supervisor, "_all_fit", lambda: nullcontext(stub))
    ended = supervisor.run()
    assert (ended.status, supervisor.restarts.total) == (RESUBMIT, 0)


def test_a_run_waits_for_hosts_that_are_not_ready_yet(tmp_path, monkeypatch):
    """A rank is killed; then no host is ready, then one is lost before its ranks start; the third restart succeeds."""
    (tmp_path / FILE).write_text(json.dumps({"kind": "train", "step": 7}) + "\n")
    job, options = Job(None, None, {}, None), LaunchOptions("pdsh", tmp_path)
    supervisor = Supervisor(job, HOSTS, options, Restarts(tmp_path, 5), StopSignals())
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
