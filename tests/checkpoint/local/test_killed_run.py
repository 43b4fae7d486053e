"""A run whose ranks are killed resumes from local copies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from bst_base.json_lines import read_lines
from bst_base.settings import dump, parse
from bst_dist.config import Recipe
from bst_dist.faults import ledger
from bst_dist.report.metrics import FILE
from bst_dist.study.comparison.equality import equality

BST = Path(sys.executable).with_name("bst")


@pytest.mark.ranks
@pytest.mark.long
def test_a_run_with_killed_ranks_resumes_from_local_copies(tmp_path, settings):
    """There is no checkpoint before the end, so the run can only resume from local copies."""
    memory = tmp_path / "memory"
    settings["train"] |= {"steps": 60}
    settings["evaluation"] |= {"every": 7}
    settings["checkpoint"] = {"every": 0, "local_every": 1, "local_directory": str(memory)}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump(parse(Recipe, settings)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole, run = tmp_path / "whole", tmp_path / "run"
    command = [BST, "train", recipe, "--ranks", "2", "--run-dir", whole, "checkpoint.local_every=0"]
    subprocess.run(list(map(str, command)), check=True, env=environment, timeout=600)

    command = [BST, "launch", recipe, "ranks=2", "--run-dir", run, "--launcher", "local", "--max-restarts", "3"]
    with (tmp_path / "log").open("wb") as log:
        launched = subprocess.Popen(list(map(str, command)), env=environment, stdout=log, stderr=log)
    reached = []
    try:
        for rank in (1, 0):
            wait_for_steps(run, (reached[-1] if reached else 0) + 8, launched)
            psutil.Process(pid_of(launched, rank)).send_signal(signal.SIGKILL)
            reached.append(wait_for_start(run, len(reached) + 2, launched))
        assert launched.wait(600) == 0, (tmp_path / "log").read_text()
    finally:
        launched.kill()
    said = (tmp_path / "log").read_text()
    assert said.count("of the local copies in") == 2, said
    assert f"copies every step in {memory}, one node; up to" in said
    found = equality(run, whole)
    assert found.passed, found
    entries = ledger.read(run, 99, 99)
    assert [(entry.action, entry.step) for entry in entries] == [("resumed", step) for step in reached]
    dropped = [line for line in read_lines(run / "metrics.dropped.jsonl") if line["kind"] == "train"]
    assert len(dropped) <= len(reached)  # at most one repeated step for each kill
    assert not list(memory.iterdir())


def wait_for_steps(run: Path, steps: int, launched: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 600
    while sum(line["kind"] == "train" for line in read_lines(run / FILE)) < steps:
        assert launched.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)


def wait_for_start(run: Path, number: int, launched: subprocess.Popen[bytes]) -> int:
    """Wait for the run's start with this number, counted from 1; return the step that it continues from."""
    deadline = time.monotonic() + 600
    while len(starts := json.loads((run / "environment.json").read_text())["starts"]) < number:
        assert launched.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert "from_local_copies" in starts[-1]
    return starts[-1]["from_step"]


def pid_of(launched: subprocess.Popen[bytes], rank: int) -> int:
    for process in psutil.Process(launched.pid).children(recursive=True):
        if "bst_dist.train" in process.cmdline() and process.environ().get("RANK") == str(rank):
            return process.pid
    raise AssertionError(f"there is no rank {rank}")
