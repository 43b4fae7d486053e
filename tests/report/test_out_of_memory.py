from __future__ import annotations

import os
import pickle
import subprocess
import sys

import pytest
import torch

from bst_dist.report.out_of_memory import snapshot_when_out_of_memory


def test_a_snapshot_is_written_and_named_in_the_error(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda.memory, "_snapshot", lambda: {"segments": [1, 2]})
    with pytest.raises(torch.OutOfMemoryError) as raised, snapshot_when_out_of_memory(tmp_path, 3):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    path = tmp_path / "memory-rank-00003.pickle"
    assert pickle.loads(path.read_bytes()) == {"segments": [1, 2]}
    (note,) = raised.value.__notes__
    assert f"memory snapshot: {path}" in note


def test_failed_snapshot_does_not_hide_the_memory_error(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda.memory, "_snapshot", dict)
    with (
        pytest.raises(torch.OutOfMemoryError, match="2 GiB") as raised,
        snapshot_when_out_of_memory(tmp_path / "no", 0),
    ):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    assert "no snapshot of the memory was written: [Errno 2]" in raised.value.__notes__[0]


def test_a_snapshot_that_cannot_be_taken_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda.memory, "_snapshot", lambda: lambda: None)  # cannot be pickled
    with pytest.raises(torch.OutOfMemoryError), snapshot_when_out_of_memory(tmp_path, 0):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    assert not list(tmp_path.iterdir())


def test_other_errors_leave_no_snapshot(tmp_path):
    with pytest.raises(RuntimeError), snapshot_when_out_of_memory(tmp_path, 0):
        raise RuntimeError("something else")
    assert not list(tmp_path.iterdir())


PROGRAM = """
import sys, torch
import bst_dist.train.step as step
from bst_dist.train.__main__ import main
torch.cuda.memory._snapshot = lambda: {"segments": []}
taken = step.Trainer.step
def full(self, number, *args):
    if number == 2:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    return taken(self, number, *args)
step.Trainer.step = full
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.ranks
def test_out_of_memory_error_of_a_run_names_its_snapshot(recipe_file, tmp_path):
    run_dir = tmp_path / "run"
    command = [sys.executable, "-c", PROGRAM, str(recipe_file()), "--run-dir", str(run_dir)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB" in done.stderr
    assert f"memory snapshot: {run_dir}/memory-rank-00000.pickle" in done.stderr
    assert pickle.loads((run_dir / "memory-rank-00000.pickle").read_bytes()) == {"segments": []}
