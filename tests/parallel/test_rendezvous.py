"""Ranks that wait for each other print for whom they wait, stop at a signal, and time out."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from bst_base.host import free_port
from bst_base.sizes import spans
from bst_dist.faults.status import RESUBMIT

END_S = 60
"""Timeout for a process to end, far more than it needs."""

PROGRAM = """
import sys
from bst_dist.faults import signals
notice = signals.listen()
from bst_dist.parallel import rendezvous
rendezvous.FIRST_WORD_S, rendezvous.NEXT_WORD_S = 0.2, 0.5
print("ready", flush=True)
sys.stdin.readline()
try:
    with notice.ending_at_once(), rendezvous.gathered(limit_s={limit_s}):
        print("together", flush=True)
        sys.stdin.read()  # rank 0 holds what the others look at
except rendezvous.GatheringError as error:
    print(error, flush=True)
    sys.exit(3)
"""


@pytest.fixture
def start() -> Iterator:
    """``start(rank, world, limit_s)`` starts a process that connects to the others when `meet` is called."""
    started, free = [], free_port()

    def one(rank: int, world: int, limit_s: float = 60.0, port: int = free) -> subprocess.Popen:
        names = {"RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {**os.environ, **{name: str(value) for name, value in names.items()}}
        environment["PYTHONUNBUFFERED"] = "1"
        program = PROGRAM.format(limit_s=limit_s)
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", program],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
        return started[-1]

    yield one
    for process in started:
        process.kill()
        process.wait()


def meet(*processes: subprocess.Popen) -> None:
    """Let the processes connect, all at once, after their imports, whose time depends on the machine's load."""
    for process in processes:
        heard(process, "ready")
    for process in processes:
        process.stdin.write("meet\n")
        process.stdin.flush()


def heard(process: subprocess.Popen, text: str) -> str:
    """Read output until a line contains `text`; return that line."""
    for line in process.stdout:
        if text in line:
            return line
    raise AssertionError(f"ended with {process.wait()} without saying {text!r}")


def test_missing_ranks_are_named_and_a_signal_ends_the_wait(start):
    first = start(0, 4)
    meet(first)
    line = heard(first, "waiting for")
    assert "waiting for 3 ranks at 127.0.0.1:" in line
    assert line.rstrip().endswith(": 1 to 3")
    first.send_signal(signal.SIGTERM)
    assert heard(first, "stopped by SIGTERM before all ranks had connected")
    assert first.wait(END_S) == RESUBMIT


def test_a_rank_that_waits_for_rank_0_reports_it_and_obeys_signals(start):
    second = start(1, 2)
    meet(second)
    assert "waiting for rank 0 at 127.0.0.1:" in heard(second, "rank 1 on")
    second.send_signal(signal.SIGUSR1)
    assert second.wait(END_S) == RESUBMIT


def test_all_ranks_continue_only_when_all_have_joined(start):
    first, second = start(0, 3), start(2, 3)
    meet(first, second)
    assert heard(first, "waiting for 1 rank at").rstrip().endswith(": 1")
    third = start(1, 3)
    meet(third)
    for process in (first, second, third):
        heard(process, "together")
    for process in (third, second, first):
        process.stdin.close()
        assert process.wait(END_S) == 0


def test_waiting_for_missing_ranks_ends_after_the_limit(start):
    first, second = start(0, 3, limit_s=4.0), start(1, 3, limit_s=4.0)
    meet(first, second)
    assert "rank 2 did not connect to " in heard(first, "within 4 s: see the output of these ranks")
    assert [first.wait(END_S), second.wait(END_S)] == [3, 3]


def test_a_port_in_use_is_reported_with_its_process_and_the_remedy(start):
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        first = start(0, 2, port=port)
        meet(first)
        line = heard(first, f"port {port} of {socket.gethostname()}, the rendezvous port of the ranks, is taken by")
        assert first.wait(END_S) == 3
    assert f"is taken by process {os.getpid()} (" in line
    assert "MASTER_PORT" in line
    assert "--master-port" in line


@pytest.mark.parametrize(("numbers", "text"), [([1], "1"), ([1, 2, 3, 7, 9, 10], "1 to 3, 7, 9 to 10"), ([], "")])
def test_rank_numbers_are_written_as_spans(numbers, text):
    assert spans(numbers) == text
