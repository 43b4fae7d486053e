"""Faults during a run on several hosts: each fault happens, and the run must equal an undisturbed run.

The undisturbed run is trained on one machine, without the launcher and agents tested here.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bst_base.json_lines import read_lines
from bst_dist.faults.status import RESUBMIT
from bst_dist.report.metrics import FILE
from bst_dist.study.comparison.equality import equality
from bst_dist.train.rundir import read_outcome

pytestmark = pytest.mark.cluster

STEPS = 60
MIDWAY = "step-00000020:"
SOON = ("--lost-after", "5", "--grace", "20")


@pytest.fixture(scope="module")
def small(recipe) -> str:
    """Path of the recipe of all these runs."""
    return str(recipe(STEPS))


@pytest.fixture(scope="module")
def undisturbed(small, tmp_path_factory) -> Path:
    """An undisturbed run of three ranks."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    bst = Path(sys.executable).with_name("bst")
    subprocess.run([bst, "train", small, "--ranks", "3", "--run-dir", run_dir], check=True)
    return run_dir


def require_same_run(run_dir: Path, undisturbed: Path) -> None:
    """Assert bitwise equality, which the same number of ranks must reach."""
    found = equality(run_dir, undisturbed)
    assert found.passed, found
    assert read_outcome(run_dir)["step"] == STEPS


def require_same_data(run_dir: Path, undisturbed: Path) -> None:
    """Assert the same tokens and bytes at every step; with another number of ranks, sums only differ in their order."""
    found, wanted = (
        [line for line in read_lines(path / FILE) if line["kind"] == "train"] for path in (run_dir, undisturbed)
    )
    assert [line["step"] for line in found] == list(range(1, STEPS + 1))
    for one, other in zip(found, wanted, strict=True):
        assert one["tokens"] == other["tokens"]
        # Nats per token over bits per byte: the text bytes of the step, which no other step's data have in common.
        assert bytes_of(one) == pytest.approx(bytes_of(other), rel=1e-9)
        assert one["loss_nats"] == pytest.approx(other["loss_nats"], rel=1e-3)


def bytes_of(line: dict[str, float]) -> float:
    return line["loss_nats"] / line["bits_per_byte"]


@pytest.mark.parametrize("launcher", ["pdsh", "openmpi"])
def test_a_host_that_loses_its_power_is_left_out_of_the_run(launch, small, network, tmp_path, undisturbed, launcher):
    victim = network.hosts[0]  # the host of rank 0, to which all ranks connect
    script = [f"launch/cluster/{launcher}.sh", small, "HOSTFILE", str(tmp_path / "run")]
    started = launch(*SOON, command=script)
    started.until(MIDWAY)
    network.power_off(victim)
    try:
        assert started.status() == 0, started.said
    finally:
        network.power_on(victim)
    assert f"lost {victim}: silent for" in started.said
    assert f"2 ranks (dp 2 x sp 1) on {', '.join(network.hosts[1:])}" in started.said
    require_same_data(tmp_path / "run", undisturbed)


def test_a_permanent_network_cut_ends_the_ranks_on_both_sides(launch, small, network, tmp_path):
    victim = network.hosts[2]
    started = launch(small, "--run-dir", str(tmp_path / "run"), *SOON)
    started.until(MIDWAY)
    network.cut(victim)
    try:
        assert started.status() == 1, started.said
        assert not network.ranks(victim)  # no rank may continue alone in the run directory
    finally:
        network.mend(victim)
    assert f"lost {victim}: silent for" in started.said


def test_a_short_network_cut_has_no_effect(launch, small, network, tmp_path, undisturbed):
    started = launch(small, "--run-dir", str(tmp_path / "run"), *SOON)
    started.until(MIDWAY)
    network.cut(network.hosts[1])
    time.sleep(2)
    network.mend(network.hosts[1])
    assert started.status() == 0, started.said
    assert "lost" not in started.said
    require_same_run(tmp_path / "run", undisturbed)


@pytest.mark.parametrize("jump_s", [7200, -7200])
def test_a_clock_that_jumps_has_no_effect(launch, small, network, tmp_path, undisturbed, jump_s):
    host = network.hosts[1]
    network.power_off(host)
    network.power_on(host, clock_ahead_s=0)
    try:
        started = launch(small, "--run-dir", str(tmp_path / "run"), *SOON)
        started.until(MIDWAY)
        network.set_clock(host, jump_s)
        assert network.seconds_ahead(host) == pytest.approx(jump_s, abs=60)
        assert started.status() == 0, started.said
    finally:
        network.power_off(host)
        network.power_on(host)
    assert "lost" not in started.said
    require_same_run(tmp_path / "run", undisturbed)


def test_a_killed_rank_is_named_and_the_restarted_run_is_equal(launch, small, network, tmp_path, undisturbed):
    started = launch(small, "--run-dir", str(tmp_path / "run"), "--max-restarts", "1", *SOON)
    started.until(MIDWAY)
    network.kill(network.ranks(network.hosts[1]))
    assert started.status() == 0, started.said
    assert f"rank 1 on {network.hosts[1]} was killed by SIGKILL" in started.said
    assert "Traceback" not in started.said  # rank 0 lost its peer; its error is not printed
    require_same_run(tmp_path / "run", undisturbed)


def test_a_host_that_restarts_empty_gets_its_state_from_a_neighbour(launch, small, network, tmp_path, undisturbed):
    """Shared storage has no checkpoint, so the lost host's rank resumes from the copy on a neighbour."""
    memory, victim = tmp_path / "memory", network.hosts[1]
    memory.mkdir()
    settings = ("checkpoint.every=0", "checkpoint.local_every=1", f"checkpoint.local_directory={memory}", "log.every=1")
    try:
        for host in network.hosts:
            network.power_off(host)
            network.power_on(host, private=memory)
        started = launch(small, *settings, "--run-dir", str(tmp_path / "run"), "--max-restarts", "2", *SOON)
        started.until(f"20/{STEPS} ")
        network.power_off(victim)
        network.power_on(victim, private=memory)  # its memory is empty, as on a new machine
        assert started.status() == 0, started.said
    finally:
        for host in network.hosts:
            network.power_off(host)
            network.power_on(host)
    assert "3 of 3 ranks also on another node" in started.said
    assert "(rank 1's from " in started.said, started.said
    require_same_run(tmp_path / "run", undisturbed)


def test_a_launcher_whose_output_is_not_read_does_not_block_the_run(launch, small, network, tmp_path, undisturbed):
    """As after Ctrl-S: the pipe is full from the first line on, for longer than the timeout of a silent host."""
    read, write = os.pipe()
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
    os.set_blocking(write, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(write, b"x" * 512)
    os.set_blocking(write, True)
    started = launch(small, "--run-dir", str(tmp_path / "run"), *SOON, output=write)
    os.close(write)
    assert started.status() == 0
    os.close(read)
    require_same_run(tmp_path / "run", undisturbed)


def test_a_launcher_that_is_stopped_for_long_restarts_from_a_checkpoint(launch, small, network, tmp_path, undisturbed):
    """The ranks are suspended until they get the signal, so that the run cannot finish before."""
    limits = ("--lost-after", "20", "--grace", "60")
    started = launch(small, "--run-dir", str(tmp_path / "run"), "--max-restarts", "1", *limits)
    started.until(MIDWAY, timeout_s=600)
    started.process.send_signal(signal.SIGSTOP)
    ranks = [rank for host in network.hosts for rank in network.ranks(host)]
    for rank in ranks:
        rank.suspend()
    deadline = time.monotonic() + 600
    while not all(told_to_stop(rank.pid) for rank in ranks):
        assert time.monotonic() < deadline, "ranks are left without anybody who watches them"
        time.sleep(0.1)
    for rank in ranks:
        rank.resume()
    while any(network.ranks(host) for host in network.hosts):
        assert time.monotonic() < deadline, "ranks train on without anybody who watches them"
        time.sleep(0.1)
    assert read_outcome(tmp_path / "run").get("stopped") == "SIGTERM", started.said
    started.process.send_signal(signal.SIGCONT)
    assert started.status(timeout_s=600) == 0, started.said
    assert "got no sign of life from this process for" in started.said, started.said
    assert "the ranks wrote a checkpoint and stopped" in started.said
    assert "lost" not in started.said
    assert "restart 1 of 1" in started.said
    require_same_run(tmp_path / "run", undisturbed)


def told_to_stop(pid: int) -> bool:
    """Whether SIGTERM is pending for a suspended process."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return bool(int(lines["ShdPnd"], 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_launcher_that_is_ended_leaves_a_checkpoint_and_no_rank(
    launch, small, network, tmp_path, undisturbed, number
):
    run_dir = tmp_path / "run"
    started = launch(small, "--run-dir", str(run_dir), *SOON)
    started.until(MIDWAY)
    started.process.send_signal(number)
    assert started.status() == (-signal.SIGKILL if number == signal.SIGKILL else RESUBMIT), started.said
    deadline = time.monotonic() + 120
    while any(network.ranks(host) for host in network.hosts):
        assert time.monotonic() < deadline, "ranks were left behind"
        time.sleep(0.1)
    reached = read_outcome(run_dir)["step"]
    assert 20 <= reached < STEPS
    resumed = launch(small, "--run-dir", str(run_dir), "--resume", *SOON)
    assert resumed.status() == 0, resumed.said
    assert f"resumed from step {reached} " in resumed.said
    require_same_run(run_dir, undisturbed)
