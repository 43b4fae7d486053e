"""A signal to one rank: all ranks stop with a checkpoint, wherever they are, and the resumed run equals one that was
never stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bst_dist.checkpoint import snapshot
from bst_dist.checkpoint.directory import newest_valid
from bst_dist.faults import signals, status
from bst_dist.parallel.ranks import Ranks
from bst_dist.train import building, evaluation
from bst_dist.train.run import train
from bst_dist.train.rundir import read_outcome
from bst_dist.train.start.request import Request
from bst_dist.train.step import Trainer

Go = Callable[..., list[int]]


@pytest.fixture
def go(recipe_file, tmp_path, on_ranks, unmeasured) -> Go:
    """``go(run, resume=…)`` trains the small recipe on two ranks that handle signals; returns their exit statuses."""
    recipe = recipe_file(train={"sequences": 4, "micro_sequences": 1}, evaluation={"every": 3, "sequences": 8})

    def on_rank(ranks: Ranks, run: str, resume: bool) -> int:
        notices.append(signals.listen())
        return train(Request(recipe, [], tmp_path / run, resume, None), ranks, notices[-1])

    return lambda run, resume=False: on_ranks(2, on_rank, run, resume)


notices: list[signals.Notice] = []
"""Signal notices of this process, if it is a rank."""


def tell(rank: int) -> None:
    """Send this process the signal if it is that rank, and wait until it is handled."""
    if int(os.environ["RANK"]) == rank:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert notices[-1].heard.wait(60)


@pytest.mark.ranks
def test_a_run_stopped_repeatedly_by_signals_equals_the_uninterrupted_one(go, tmp_path, monkeypatch, assert_same_run):
    run = tmp_path / "parts"
    originals = {"setting up": building.peak_flops, "training": Trainer._accumulate}
    originals |= {"evaluating": evaluation._by_block, "saving": snapshot.Snapshots.start}

    def setting_up(*args: Any) -> float:
        tell(1)
        return originals["setting up"](*args)

    def training(self: Trainer, *args: Any, **named: Any) -> Any:
        if self.tokens == 1 * 4 * 32:
            tell(1)
        return originals["training"](self, *args, **named)

    def saving(self: snapshot.Snapshots, position: snapshot.Position, *args: Any) -> Any:
        if position.step == 4:
            tell(1)
        return originals["saving"](self, position, *args)

    def evaluating(told_in: int) -> Callable[..., Any]:
        def by_block(*args: Any) -> Any:
            batches.append(0)
            if len(batches) == told_in:
                tell(0)
            return originals["evaluating"](*args)

        batches: list[int] = []
        return by_block

    for target, name, patched, stopped_after in (
        (building, "peak_flops", setting_up, 0),
        (Trainer, "_accumulate", training, 2),
        (evaluation, "_by_block", evaluating(2), 3),
        (snapshot.Snapshots, "start", saving, 5),
        (evaluation, "_by_block", evaluating(2), 6),  # the last evaluation, after all steps
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, patched)
            assert go("parts", resume=True) == [status.RESUBMIT] * 2
        outcome = read_outcome(run)
        assert (outcome["stopped"], outcome["step"], outcome["finished"]) == ("SIGUSR1", stopped_after, False)
        if stopped_after:
            assert newest_valid(run).name == f"step-{stopped_after:08d}"
    assert go("parts", resume=True) == [status.DONE] * 2
    assert read_outcome(run)["finished"]
    assert go("whole") == [status.DONE] * 2
    assert_same_run(run, tmp_path / "whole")


def test_sighup_is_a_stop_signal_unless_it_is_ignored():
    """nohup ignores SIGHUP. The other signals are always handled."""
    before = signal.getsignal(signal.SIGHUP)
    try:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        assert signals.stopping() == [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP]
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        assert signals.stopping() == [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_after_the_copy_interval_counts_as_a_second_one(monkeypatch):
    now = [5.0]
    monkeypatch.setattr(signals, "time", SimpleNamespace(monotonic=lambda: now[0]))
    notice, found = signals.Notice(), []
    for at in (5.0, 5.0 + signals.SAME_NOTICE_S, 5.1 + signals.SAME_NOTICE_S):
        found.append((notice.signal, notice.heard.is_set(), notice.again))
        now[0] = at
        notice.take(signal.SIGTERM)
    assert found == [(None, False, False), (signal.SIGTERM, True, False), (signal.SIGTERM, True, False)]
    assert notice.again


LISTENER = """
import hashlib, sys, threading, time
from types import SimpleNamespace
from bst_dist.faults import signals

now = 0.0
signals.time = SimpleNamespace(monotonic=lambda: now, sleep=time.sleep)
notice = signals.listen()
take = notice.take

def heard(number):
    take(number)
    print(number, notice.signal.name, flush=True)

def clock():
    global now
    for line in sys.stdin:
        now = float(line)
        print("it is", now, flush=True)

notice.take = heard
threading.Thread(target=clock, daemon=True).start()
print("listening", flush=True)
hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes without an instruction of the interpreter's
"""


def test_only_a_second_ctrl_c_ends_a_rank_at_once():
    """With a clock that the test sets.

    A SIGINT soon after the first signal counts as a copy of it, because launchers send copies. Slurm's second SIGTERM
    must not prevent the checkpoint.
    """
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    process = subprocess.Popen([sys.executable, "-c", LISTENER], **pipes)
    assert process.stdout.readline() == "listening\n"
    soon, later = signals.SAME_NOTICE_S - 0.1, signals.SAME_NOTICE_S + 0.1
    for at, number in ((0, signal.SIGTERM), (soon, signal.SIGINT), (later, signal.SIGTERM), (later, signal.SIGUSR1)):
        process.stdin.write(f"{at}\n")
        assert process.stdout.readline() == f"it is {float(at)}\n"
        process.send_signal(number)
        assert process.stdout.readline() == f"{int(number)} SIGTERM\n"  # handled, and the process continues
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 128 + signal.SIGINT
    assert process.communicate()[0] == ""


def test_a_rank_ends_when_its_deepspeed_launcher_dies(tmp_path):
    rank = "from bst_dist.faults import signals; import time; signals.listen(); print(1, flush=True); time.sleep(600)"
    launcher = (
        "import subprocess, sys\n"
        f"rank = subprocess.Popen([sys.executable, '-c', {rank!r}], stdout=subprocess.PIPE)\n"
        "assert rank.stdout.readline() == b'1\\n'; print(rank.pid, flush=True); rank.wait()\n"
    )
    # The rank looks for this name in its parent's command line.
    command = [sys.executable, "-c", launcher, "deepspeed.launcher.launch"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    pid = int(process.stdout.readline())
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{pid}/stat").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < deadline, "the rank outlives its launcher"
        time.sleep(0.02)


def test_directories_are_tested_only_after_a_further_signal(monkeypatch):
    """Before it, the answers are not used, and every rank's files would disturb the checkpoint."""
    events, over = [], threading.Event()
    answers = iter([{}, {}, {"/runs/a": 40.0}])

    class Told:
        signal, heard = signal.SIGTERM, threading.Event()

        @property
        def again(self) -> bool:
            events.append("asked")
            return len(events) > 3

    disks = SimpleNamespace(watch=events.append, silent=lambda: next(answers))
    monkeypatch.setattr(signals, "STUCK_TICK_S", 0.0)
    monkeypatch.setattr(signals, "end", lambda status, message: (events.append(status), over.set()))
    told = Told()
    signals.end_when_stuck(told, disks)
    told.heard.set()
    assert over.wait(60)
    assert events == ["asked"] * 4 + ["told to stop", status.UNREADABLE]


def members(session: int) -> list[int]:
    """Return the processes of a session that have not ended."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, _, leader, *_ = stat.read_text().rpartition(")")[2].split()
            if int(leader) == session and state != "Z":
                found.append(int(stat.parent.name))
    return found


COMPILES = """
import sys, time
from functools import partial
from pathlib import Path
from bst_dist.faults import signals
from bst_dist.faults.ending import end

notice = signals.listen()
from torch._inductor import config
from torch._inductor.async_compile import AsyncCompile

config.compile_threads = 2
pool = AsyncCompile.process_pool()
for name in sys.argv[1:]:
    job = pool.submit(partial(Path.read_text, Path(name)))
    print("submitted", flush=True)
    notice.heard.wait()
    while not job.done():  # torch does not notice that the process it gave the job to has died
        pool.process.poll() is None or end(1)
        time.sleep(0.1)
    print(notice.signal.name, job.result(), flush=True)
"""


def test_the_workers_of_the_compiler_survive_a_signal_to_all_processes_but_not_the_rank(tmp_path):
    """As Slurm signals a step. A job waits for text from a named pipe: first at the signal, then when the rank dies."""
    pipes = [tmp_path / name for name in ("first", "second")]
    for pipe in pipes:
        os.mkfifo(pipe)
    command = [sys.executable, "-c", COMPILES, *map(str, pipes)]
    rank = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert rank.stdout.readline() == "submitted\n"
        with pipes[0].open("w") as first:  # waits until the worker has opened it
            for number in signals.STOPPING:
                os.killpg(rank.pid, number)
            first.write("compiled")
        said = rank.stdout.readline().split()
        assert said[1:] == ["compiled"], "the signal has ended a worker"
        assert rank.stdout.readline() == "submitted\n"
        with pipes[1].open("w"):
            assert len(members(rank.pid)) > 2
            rank.kill()
            rank.wait()
        deadline = time.monotonic() + 300
        while members(rank.pid):
            assert time.monotonic() < deadline, "a worker outlives its rank"
            time.sleep(0.05)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(rank.pid, signal.SIGKILL)
