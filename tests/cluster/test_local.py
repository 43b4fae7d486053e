"""The ranks of one host: their exit statuses are reported correctly, and no child process outlives them."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from bst_base.errors import UserError
from bst_dist.cluster import local, processes, verdict
from bst_dist.cluster.processes import HostRanks, LocalRanks
from bst_dist.faults.status import RESUBMIT

# A rank that writes its process id and that of a child process to a file, and then runs the test's code.
RANK = """
import os, signal, subprocess, sys, time
rank = int(os.environ["RANK"])
{first}
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
with open(f"{{sys.argv[1]}}/{{rank}}.new", "w") as file:
    file.write(f"{{os.getpid()}} {{child.pid}}")
os.rename(file.name, f"{{sys.argv[1]}}/{{rank}}")
while len([name for name in os.listdir(sys.argv[1]) if name.isdigit()]) < 2:
    time.sleep(0.01)
{then}
"""


@pytest.fixture(autouse=True)
def no_settling(monkeypatch):
    """Wait only briefly for other ranks after a failure."""
    monkeypatch.setattr(verdict, "SETTLE_S", 0.3)


def started(tmp_path: Path) -> bool:
    return all((tmp_path / str(rank)).exists() for rank in range(2))


def run(tmp_path: Path, then: str, first: str = "", grace_s: float = 30.0) -> local.Ended:
    """Run two such ranks; return how they ended, after none of their processes is left."""
    command = [sys.executable, "-c", RANK.format(first=first, then=then), str(tmp_path)]
    ended = local.launch(command, HostRanks(0, 2, 2, "127.0.0.1", 1), grace_s)
    pids = [int(pid) for rank in range(2) for pid in (tmp_path / str(rank)).read_text().split()]
    deadline = time.monotonic() + 60
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline, "something outlived the launch"
        time.sleep(0.05)
    return ended


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@pytest.mark.parametrize(
    ("then", "status", "culprit", "settle_s"),
    [
        ("sys.exit(0)", 0, None, 60),
        ("sys.exit(3 if rank else 0)", 3, 1, 60),
        ("time.sleep(600) if rank else os.kill(os.getpid(), signal.SIGKILL)", 137, 0, 0.3),
        ("sys.exit(1) if rank == 0 else os.kill(os.getpid(), signal.SIGSEGV)", 139, 1, 60),
        ("time.sleep(600) if rank else sys.exit(2)", 2, 0, 0.3),
    ],
)
def test_exit_status_is_that_of_the_culprit_rank(tmp_path, monkeypatch, then, status, culprit, settle_s):
    """`settle_s`: time to wait for the other ranks' statuses; if all arrive, the wait is shorter."""
    monkeypatch.setattr(verdict, "SETTLE_S", settle_s)
    ended = run(tmp_path, then)
    assert (ended.status, ended.culprit) == (status, culprit)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
@pytest.mark.parametrize(("on_sigterm", "status"), [("lambda *_: sys.exit(75)", 75), ("signal.SIG_DFL", None)])
def test_a_signal_stops_the_ranks_and_their_status_is_returned(tmp_path, number, on_sigterm, status):
    def send() -> None:
        while not started(tmp_path):
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    threading.Thread(target=send, daemon=True).start()
    ended = run(tmp_path, "time.sleep(600)", f"signal.signal(signal.SIGTERM, {on_sigterm})")
    assert ended.status == (status or 128 + signal.SIGTERM)
    assert not ended.worth_a_restart


def test_ranks_that_do_not_stop_are_killed_after_the_grace_period(tmp_path):
    def send() -> None:
        while not started(tmp_path):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=send, daemon=True).start()
    ended = run(tmp_path, "time.sleep(600)", "signal.signal(signal.SIGTERM, signal.SIG_IGN)", 0.5)
    assert ended.status == RESUBMIT  # to be resumed from the checkpoint before
    assert ended.explain({}) == "killed because they did not stop within --grace: ranks 0 to 1"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT])
def test_only_a_second_ctrl_c_kills_the_ranks_at_once(tmp_path, monkeypatch, number):
    """With a clock that the test sets.

    A signal soon after the first counts as a copy of it. Slurm sends SIGTERM again, seconds after the first, to ranks
    that write their checkpoint.
    """
    now, read, looked = [0.0], [], []
    clock = SimpleNamespace(monotonic=lambda: read.append(None) or now[0])
    monkeypatch.setattr("bst_dist.faults.signals.time", clock)  # read once for every signal that is handled
    poll = processes.LocalRanks.poll
    monkeypatch.setattr(processes.LocalRanks, "poll", lambda ranks: looked.append(None) or poll(ranks))

    def until_more_in(seen: list[None], count: int = 1) -> None:
        before = len(seen)
        while len(seen) < before + count:
            time.sleep(0.01)

    def send(at: float, number: int) -> None:
        now[0], before = at, len(read)
        os.kill(os.getpid(), number)
        while len(read) == before:
            time.sleep(0.01)
        until_more_in(looked, 4)  # by then the launcher has reacted

    def send_all() -> None:
        while not started(tmp_path):
            time.sleep(0.02)
        soon, later = processes.SAME_KEY_S - 0.1, processes.SAME_KEY_S + 0.1
        for at, again in ((0, number), (soon, number), (later, signal.SIGTERM), (later, signal.SIGUSR1)):
            send(at, again)
        running.append(all(alive(int((tmp_path / str(rank)).read_text().split()[0])) for rank in range(2)))
        os.kill(os.getpid(), signal.SIGINT)

    running: list[bool] = []
    thread = threading.Thread(target=send_all, daemon=True)
    thread.start()
    ended = run(tmp_path, "time.sleep(600)", "signal.signal(signal.SIGTERM, signal.SIG_IGN)", 3600.0)
    assert running == [True]
    assert ended.status == 128 + signal.SIGINT
    assert ended.explain({}) == "a second signal: the ranks were killed"
    thread.join()


@pytest.mark.parametrize(("cores", "threads"), [(1, "1"), (2, "1"), (7, "3"), (8, "4")])
def test_rank_output_is_printed_and_cores_are_shared(capfd, monkeypatch, cores, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    program = "import os; print(os.environ['OMP_NUM_THREADS'])"
    assert local.launch([sys.executable, "-c", program], HostRanks(0, 2, 2, "127.0.0.1", 1)).status == 0
    assert capfd.readouterr().out.split() == [threads] * 2


def test_an_ignored_sighup_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with processes.catch_stop_signals() as stop_signals:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.05)
        assert stop_signals == processes.StopSignals()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_ranks_die_with_the_process_that_started_them(tmp_path):
    program = (
        "import sys; from bst_dist.cluster.processes import LocalRanks, HostRanks; import os, time;"
        "command = [sys.executable, '-c', 'import time; time.sleep(600)'];"
        "ranks = LocalRanks(command, HostRanks(0, 1, 1, '', 1), os.environ);"
        "print(ranks.processes[0].pid, flush=True); os.kill(os.getpid(), 9)"
    )
    pid = int(subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE).stdout)
    deadline = time.monotonic() + 60
    while alive(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_rank_that_reported_its_final_status_is_not_waited_for(tmp_path):
    """For example a rank that ends while one of its threads hangs in the kernel, which still shows it as running."""
    program = "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    program += "int(os.environ['RANK']) or os.write(int(os.environ['BST_LAST_WORD']), b'70\\n'); time.sleep(600)"
    begun = time.monotonic()
    ended = local.launch([sys.executable, "-c", program], HostRanks(0, 2, 2, "127.0.0.1", 1))
    assert (ended.statuses, ended.status, ended.culprit) == ({0: 70}, 70, 0)
    assert time.monotonic() - begun < 300  # not the rank's ten minutes


@pytest.mark.parametrize("again", [False, True])
def test_a_stop_signal_does_not_end_the_processes_that_a_rank_has_started(again):
    """Such as the compiler's: without it the rank cannot take its last step. None is left when the rank has ended."""
    program = """
import os, signal, subprocess, sys, time
stops = []
signal.signal(signal.SIGTERM, lambda number, _: stops.append(number))
child = subprocess.Popen(["sleep", "600"])
print(child.pid, flush=True)
while len(stops) < int(sys.argv[1]):
    time.sleep(0.02)
time.sleep(0.5)  # a signal to the child would have arrived
sys.exit(75 if child.poll() is None else 1)
"""
    ranks = LocalRanks(
        [sys.executable, "-c", program, str(1 + again)], HostRanks(0, 1, 1, "127.0.0.1", 1), os.environ, piped=True
    )
    try:
        child = int(ranks.processes[0].stdout.readline())
        ranks.terminate(600)
        if again:
            time.sleep(0.2)  # two signals at once would count as one
            ranks.remind()
        deadline = time.monotonic() + 60
        while not ranks.poll():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert ranks.poll() == {0: 75}
        while alive(child):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        ranks.kill()


def test_a_final_status_is_kept_whoever_reads_it_first():
    """Both `running` and `poll` read the pipe; a status that `running` has read must not be lost."""
    program = "import os, time; os.write(int(os.environ['BST_LAST_WORD']), b'70\\n'); time.sleep(600)"
    ranks = LocalRanks([sys.executable, "-c", program], HostRanks(0, 1, 1, "127.0.0.1", 1), os.environ)
    try:
        while ranks.running:
            time.sleep(0.05)
        assert not ranks.running
        assert ranks.poll() == {0: 70}
    finally:
        ranks.kill()


@pytest.mark.parametrize(
    "words",
    [["--nodes", "1", "--node", "3"], ["--nodes", "2", "--node", "2", "--master", "a:1"], ["--nodes", "2"]],
)
def test_a_node_that_does_not_fit_is_refused(words):
    parser = argparse.ArgumentParser()
    local.add_arguments(parser)
    with pytest.raises(UserError, match="nodes count from 0, and --master ADDRESS:PORT says where node 0 is"):
        local.share_of(parser.parse_args(["recipe.yaml", "--ranks", "2", *words]), recipe=None)
