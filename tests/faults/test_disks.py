"""Which ranks write into a directory to test it."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from bst_dist.faults import disks
from bst_dist.faults.disks import STILL, TOLD_TO_STOP, Disks


@pytest.mark.parametrize(
    ("why", "environment", "writes"),
    [
        (STILL, {}, True),
        (STILL, {"LOCAL_RANK": "0"}, True),
        (STILL, {"LOCAL_RANK": "1"}, False),
        (STILL, {"SLURM_LOCALID": "7"}, False),
        (TOLD_TO_STOP, {"LOCAL_RANK": "1"}, True),
    ],
)
def test_one_rank_of_a_host_writes_while_a_job_is_still_and_all_do_after_a_further_signal(
    why, environment, writes, tmp_path, monkeypatch
):
    """Whoever writes notices a file system that hangs in writing; whoever does not, one that hangs in every access."""
    for name in ("LOCAL_RANK", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    calls, wrote, looked, over = [], threading.Event(), threading.Event(), threading.Event()
    stat = os.stat

    def note(event: threading.Event) -> None:
        calls.append(event)
        event.set()
        over.wait(300)  # as a file system that hangs

    def look(path: Path, **named: object) -> os.stat_result:
        if path == tmp_path and threading.current_thread().name == "disk":
            note(looked)
        return stat(path, **named)

    monkeypatch.setattr(disks, "_write", lambda folder: note(wrote))
    monkeypatch.setattr(os, "stat", look)
    tested = Disks()
    tested.add(written=[tmp_path])
    tested.watch(why)
    assert (wrote if writes else looked).wait(300)
    assert calls == [wrote if writes else looked]
    assert list(tested.silent(-1.0)) == [str(tmp_path)]
    tested.watch(why, wanted=False)
    over.set()
