"""Only one rank prints why a job ends, and only once."""

from __future__ import annotations

import signal
import sys
import threading

import pytest

from bst_dist.faults import error_report
from bst_dist.faults.error_report import KEY, lost_peer, report_once
from bst_dist.faults.heartbeats import LocalBoard
from bst_dist.faults.signals import Notice


@pytest.fixture
def board(monkeypatch):
    """The job's board in this process, with short waits."""
    board = LocalBoard()
    monkeypatch.setattr(error_report, "_board", lambda: board)
    for name, value in {"WAIT_S": 0.3, "STAYS_S": 0.0, "LOOK_S": 0.01}.items():
        monkeypatch.setattr(error_report, name, value)
    return board


@pytest.mark.parametrize(
    ("rank", "first", "said"),
    [
        (0, None, "bst train: no such corpus\n"),
        (1, "no such corpus", ""),
        (1, "no space on /a", "no such corpus\n"),
        (1, None, "no such corpus\n"),
    ],
)
def test_an_error_that_rank_0_also_has_is_printed_once(board, monkeypatch, capsys, rank, first, said):
    monkeypatch.setenv("RANK", str(rank))
    if first:
        board.put(KEY, first)
    report_once("no such corpus", Notice())
    told = capsys.readouterr().err
    assert told.endswith(said)
    assert (": rank 1 on " in told) == bool(rank and said)
    assert board.get([KEY]) == [first if rank else "no such corpus"]


@pytest.mark.parametrize(("rank", "peer_gone"), [(1, False), (1, True), (0, True)])
def test_a_rank_told_to_stop_while_waiting_prints_no_error(board, monkeypatch, capsys, rank, peer_gone):
    """The launcher ends it because another rank has failed, and prints that rank."""
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setattr(error_report, "WAIT_S", 60.0)
    notice = Notice()
    threading.Timer(0.05, notice.take, [signal.SIGTERM]).start()
    report_once("Connection closed by peer", notice, peer_gone)
    assert capsys.readouterr().err == ""


def test_a_rank_that_fails_after_a_stop_signal_prints_its_error(board, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    notice = Notice()
    notice.take(signal.SIGTERM)
    report_once("no space on /a", notice)
    assert "no space on /a" in capsys.readouterr().err


def test_errors_are_printed_when_reading_the_board_fails(board, monkeypatch, capsys):
    def gone(keys):
        raise RuntimeError("Connection reset by peer")

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(board, "get", gone)
    report_once("no such corpus", Notice())
    assert "no such corpus" in capsys.readouterr().err


def test_rank_0_prints_its_error_when_writing_the_board_fails(board, monkeypatch, capsys):
    def gone(key, text):
        raise RuntimeError("Broken pipe")

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(board, "put", gone)
    report_once("no such corpus", Notice())
    assert capsys.readouterr().err == "bst train: no such corpus\n"


def test_errors_of_a_lost_rank_are_distinguished_from_others():
    from torch.distributed import DistBackendError

    assert lost_peer(RuntimeError("[pair.cc:534] Connection closed by peer [127.0.0.1]:2000"))
    assert lost_peer(DistBackendError("NCCL error: remote process exited or there was a network error"))
    assert not lost_peer(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not lost_peer(ValueError("Connection closed by peer"))


def test_before_torch_is_imported_there_is_no_board(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch.distributed")
    assert error_report._board() is None
