"""`bst launch` on several hosts, as a user starts it: checks before the start, and a normal run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest

from bst_base.json_lines import read_lines
from bst_base.stopping import Stopped
from bst_dist.checkpoint.directory import CHECKPOINTS, committed, step_of
from bst_dist.cli import main
from bst_dist.cluster.controller import LaunchOptions
from bst_dist.cluster.launch import _train
from bst_dist.cluster.probe import old_ranks
from bst_dist.cluster.processes import StopSignals
from bst_dist.cluster.restarts import Restarts
from bst_dist.cluster.supervise import Supervisor
from bst_dist.cluster.verdict import Ended
from bst_dist.faults.status import RESUBMIT, UNREADABLE, USER_ERROR
from bst_dist.report.metrics import FILE
from bst_dist.train.rundir import OUTCOME, read_outcome


def test_a_dry_run_shows_the_commands_and_writes_nothing(recipe, tmp_path, capsys, monkeypatch):
    (tmp_path / "hosts").write_text("node-01 slots=2\nnode-02 slots=4\n")
    monkeypatch.setenv("PATH", str(tmp_path))  # not even pdsh is needed
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    command = ["launch", str(recipe(6)), "train.steps=7", "--hostfile", str(tmp_path / "hosts"), "--dry-run"]
    assert main([*command, "--run-dir", str(tmp_path / "run")]) == 0
    said, warned = capsys.readouterr()
    assert "CUDA_VISIBLE_DEVICES=3 applies to this machine only" in warned
    assert "CUDA_VISIBLE_DEVICES" not in said
    assert "node-02      ranks 2 to 5 of 6" in said
    assert "pdsh -R ssh" in said
    assert "bst_dist.train" in said
    assert "train.steps=7" in said
    assert "NCCL_DEBUG=WARN" in said
    assert f"writes       {tmp_path}/run" in said
    assert not (tmp_path / "run").exists()


class NeverStarted:
    """Stub of a supervisor that records the options of the launch."""

    seen: ClassVar[list[LaunchOptions]] = []

    def __init__(self, job, hosts, options, restarts, stop_signals) -> None:
        self.seen.append(options)

    def check(self) -> None:
        return


def test_agents_do_not_inherit_what_this_machine_lacks(recipe, tmp_path, capsys, monkeypatch):
    """Launched from a machine without an accelerator, whose devices were also hidden by the user."""
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr("bst_dist.cluster.launch.Supervisor", NeverStarted)
    monkeypatch.setattr(NeverStarted, "seen", [])
    command = ["launch", str(recipe(6)), "--launcher", "local", "--check", "--run-dir", str(tmp_path / "run")]
    assert main(command) == 0
    assert os.environ["DS_ACCELERATOR"] == "cpu"  # in this process, which must not look for one
    (options,) = NeverStarted.seen
    assert "DS_ACCELERATOR" not in options.environment
    assert options.environment["CUDA_VISIBLE_DEVICES"] == ""
    assert "applies to this machine only" not in capsys.readouterr().err  # an agent here inherits it


@pytest.mark.parametrize("how", ["stopped", "refused"])
def test_a_start_without_training_does_not_report_the_previous_one(tmp_path, capsys, how):
    """The previous start was stopped, and has left its outcome in the run directory."""
    before = {"step": 7, "stopped": "SIGTERM"}
    (tmp_path / OUTCOME).write_text(json.dumps(before))

    def run() -> Ended:
        if how == "stopped":
            raise Stopped("told to stop (SIGUSR1) while no rank of the run was running")
        return Ended(1, {0: USER_ERROR})

    supervisor = SimpleNamespace(
        job=SimpleNamespace(asked=SimpleNamespace(run_dir=tmp_path)),
        run=run,
        stop_signals=StopSignals(signal.SIGUSR1),
        restarts=Restarts(tmp_path, 0),
    )
    status = RESUBMIT if how == "stopped" else USER_ERROR
    found = _train(supervisor, steps=10)
    assert found == {"passed": False, "exit_status": status, "run_dir": str(tmp_path), "restarts": 0}
    assert read_outcome(tmp_path) == before
    said = capsys.readouterr()
    assert "step 7" not in said.out
    assert ("told to stop (SIGUSR1)" in said.err) == (how == "stopped")


def test_a_launcher_that_is_not_installed_is_a_user_error(recipe, tmp_path, capsys, monkeypatch):
    (tmp_path / "hosts").write_text("node-01 slots=2\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["launch", str(recipe(6)), "--hostfile", str(tmp_path / "hosts"), "--check"]) == USER_ERROR
    assert "pdsh is not on the PATH" in capsys.readouterr().err


def test_a_dry_run_needs_no_run_directory_and_shows_idle_slots(recipe, tmp_path, capsys, monkeypatch):
    (tmp_path / "hosts").write_text("node-01 slots=4\nnode-02 slots=4\n")  # six sequences per step
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    assert main(["launch", str(recipe(6)), "deepspeed=ds_configs/zero1.json", "--hostfile", "hosts", "--dry-run"]) == 0
    assert "idle         2 slots of node-02" in capsys.readouterr().out
    assert sorted(tmp_path.iterdir()) == before
    (tmp_path / "hosts").write_text("node-01 slots=4\n")
    assert main(["launch", str(recipe(6)), "deepspeed=ds_configs/zero1.json", "--hostfile", "hosts", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "masked       2 of 4 ranks have 2 sequences, 2 of 4 ranks have 1 sequence and 1 masked" in said


@pytest.mark.parametrize("wrong", [["--until", "-5"], ["--max-restarts", "-1"], ["--lost-after", "0"], ["--port", "0"]])
def test_launch_options_out_of_range_are_refused(wrong, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["launch", "recipe.yaml", *wrong])
    assert ended.value.code == 2
    assert f"argument {wrong[0]}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--launcher", "slurm", "--ssh-port", "2222"], "--ssh-port: --launcher slurm does not use ssh"),
        (["--launcher", "local", "--ssh-port", "2222"], "--ssh-port: --launcher local does not use ssh"),
        (["--launcher", "local", "--hostfile", "hosts"], "--launcher local starts the ranks on this machine"),
    ],
)
def test_launch_options_that_the_launcher_does_not_use_are_refused(
    recipe, tmp_path, monkeypatch, capsys, options, said
):
    (tmp_path / "hosts").write_text("node-07 slots=2\n")
    monkeypatch.chdir(tmp_path)
    assert main(["launch", str(recipe(6)), *options, "--dry-run"]) == USER_ERROR
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [["--ranks", "-1"], ["--ranks", "0"], ["--until", "-5"], ["--grace", "-1"]])
def test_train_options_out_of_range_are_refused(wrong, capsys):
    with pytest.raises(SystemExit):
        main(["train", "recipe.yaml", *wrong])
    assert f"argument {wrong[0]}" in capsys.readouterr().err


def test_ranks_on_this_machine_write_a_checkpoint_when_the_launcher_is_killed(recipe, tmp_path):
    """The whole command. The launcher of other hosts (pdsh, srun) may be killed with it; here it is the agent."""
    run_dir = tmp_path / "run"
    command = [str(Path(sys.executable).with_name("bst")), "launch", str(recipe(5000, checkpoint={"every": 0}))]
    command += ["log.every=1", "--launcher", "local", "--run-dir", str(run_dir)]
    with (tmp_path / "log").open("wb") as log:
        launcher = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        wait_until(lambda: (run_dir / FILE).is_file() and len(read_lines(run_dir / FILE)) > 3)
    finally:
        launcher.kill()
        launcher.wait()
    wait_until(lambda: not old_ranks(str(run_dir)))
    (checkpoint,) = committed(run_dir)
    assert 3 < step_of(checkpoint) < 5000
    assert read_outcome(run_dir)["step"] == step_of(checkpoint)


def wait_until(true: Callable[[], bool]) -> None:
    """Wait until the condition holds, at most two minutes."""
    deadline = time.monotonic() + 120
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.cluster
def test_hosts_that_cannot_be_reached_are_all_named(launch, recipe, network, tmp_path):
    down = network.hosts[1:]
    for host in down:
        network.power_off(host)
    try:
        started = launch(str(recipe(6)), "--run-dir", str(tmp_path / "run"))
        assert started.status() == USER_ERROR, started.said
    finally:
        for host in down:
            network.power_on(host)
    assert f"not started: fix the problems of {', '.join(down)} above" in started.said
    for host in down:
        assert f"ssh: connect to host {host}" in started.said
    assert f"{network.hosts[0]}  1 slot  reached" in started.said


@pytest.mark.cluster
def test_a_run_directory_that_is_not_shared_and_a_wrong_clock_are_reported(launch, recipe, network, tmp_path):
    odd, shared = network.hosts[1], tmp_path / "shared"
    shared.mkdir()
    network.power_off(odd)
    network.power_on(odd, clock_ahead_s=300, private=shared)
    try:
        started = launch(str(recipe(6)), "--run-dir", str(shared / "run"))
        assert started.status() == USER_ERROR, started.said
    finally:
        network.power_off(odd)
        network.power_on(odd)
    (line,) = [line for line in started.said.splitlines() if line.startswith(odd)]
    assert "is it shared?" in line
    assert "its clock is 300.0 s ahead" in started.said
    assert f"not started: fix the problems of {odd} above" in started.said
    assert list(shared.iterdir()) == []


@pytest.mark.cluster
def test_a_run_on_three_hosts_leaves_only_its_run_directory(launch, recipe, network, tmp_path):
    run_dir: Path = tmp_path / "run"
    started = launch(str(recipe(6)), "--run-dir", str(run_dir), "--json", str(tmp_path / "report.json"))
    assert started.status() == 0, started.said
    assert read_outcome(run_dir)["step"] == 6
    assert '"restarts": 0' in (tmp_path / "report.json").read_text()
    assert "3 ranks (dp 3 x sp 1)" in started.said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hosts", "launch-0.log", "report.json", "run"]
    for host in network.hosts:
        assert f"{host}  1 slot  python" in started.said
        assert not network.ranks(host)


def test_a_run_directory_that_cannot_be_read_for_a_while_is_waited_for(recipe, tmp_path, capsys, monkeypatch):
    """The whole command, with real ranks: before the first start the checkpoints become unreadable, also to it."""
    run_dir, trained = tmp_path / "run", []

    def train(self: Supervisor, *asked: object) -> Ended:
        if not trained:
            run_dir.mkdir(exist_ok=True)
            (run_dir / CHECKPOINTS).touch()  # listing a file is an error, also for root
        trained.append(start(self, *asked))
        return trained[-1]

    start = Supervisor._train
    monkeypatch.setattr(Supervisor, "_train", train)
    monkeypatch.setattr(Supervisor, "_wait", lambda self, seconds: (run_dir / CHECKPOINTS).unlink())
    command = ["launch", str(recipe(2)), "ranks=1", "--launcher", "local", "--run-dir", str(run_dir)]
    assert main([*command, "--max-restarts", "1"]) == 0
    assert [ended.status for ended in trained] == [UNREADABLE, 0]
    assert "restart 1 of 1" in capsys.readouterr().err
    assert read_outcome(run_dir)["step"] == 2
