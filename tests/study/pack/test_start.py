"""The start of a packed sweep: the folder for its state, and failures that stop it or not."""

from __future__ import annotations

import argparse
import os

import pytest

from bst_base.errors import UserError
from bst_dist.study.pack import start, wheels
from bst_dist.study.pack.contents import read_pack
from bst_dist.study.pack.machine import Machine, arguments
from bst_dist.study.runs.runner import Worker
from bst_dist.study.runs.state import FailedStart


def test_packed_sweep_goes_on_after_failures_that_are_repeated(packed, tmp_path, monkeypatch):
    """Memory that ran out, or one failure of a run that may be repeated, are no reason to stop."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    args = argparse.Namespace(
        folder=packed[2], out=tmp_path / "back", state=tmp_path / "state", results=None, minutes=60.0, side_by_side=2
    )
    made = Machine(read_pack(packed[2]), args)
    workers = [Worker(job, None, 0) for job in made.jobs if job.trunk is None]

    def record(status, of):
        for worker in of:
            start = FailedStart(status=status, reason="a cable", exit_status=1, micro_sequences=4, time_s=1.0)
            made.state.record(worker.run.name, start)
        made._watch(of)

    record("out of memory", workers)
    record("failed", workers)
    assert made.state.status_of(workers[0].run).status == "waiting"  # one more try is allowed
    record("failed", workers[:7])
    with pytest.raises(UserError, match=r"the first 8 runs all failed.*: a cable\n8 of the runs failed 2 times"):
        record("failed", workers[7:])  # twice as many as 2 x 2 workers


def test_state_folder_can_be_given_in_both_ways(packed, tmp_path, monkeypatch):
    """run.py and the program it starts must mean the same folder."""
    started = []
    monkeypatch.setattr(start, "__file__", str(packed[2] / "run.py"))
    monkeypatch.setattr(start.os, "execve", lambda _, program, environment: started.append((program, environment)))
    monkeypatch.setattr(start, "_install", lambda *_: "")
    (packed[2] / "pythons").write_text(wheels.HERE + "\n")
    monkeypatch.chdir(tmp_path)
    given = (["--state", "there"], ["--state=there"], ["--state", "no", f"--state={tmp_path / 'there'}"])
    for words in given:
        start.main([*words, "--minutes", "3"])
        program, environment = started.pop()
        assert str(tmp_path / "there" / "packages") in environment["PYTHONPATH"].split(os.pathsep)
        assert program[1:4] == ["-m", "bst_dist.study.pack.machine", str(packed[2])]
        assert (tmp_path / "there" / "data").is_dir()
        args = arguments().parse_args(program[3:])
        assert (args.state, args.minutes) == (tmp_path / "there", 3.0)
    start.main([])
    assert arguments().parse_args(started.pop()[0][3:]).state == packed[2] / "state"
    with pytest.raises(SystemExit):
        arguments().parse_args([str(packed[2]), "--stat", "there"])
