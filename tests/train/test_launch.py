"""`bst train` as a user starts it."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from bst_base.json_lines import read_lines
from bst_dist.checkpoint.directory import load_weights, newest_valid
from bst_dist.cli import main
from bst_dist.faults.status import UNREADABLE
from bst_dist.train.rundir import closing, read_outcome

BST = (sys.executable, "-m", "bst_dist")


@pytest.mark.ranks
def test_bst_train_trains_resumes_by_its_directory_and_reports(recipe_file, corpus, tmp_path, capfd):
    recipe, run_dir, report = str(recipe_file()), tmp_path / "run", tmp_path / "report.json"
    assert main(["train", recipe, "--run-dir", str(run_dir), "--ranks", "2", "--until", "3"]) == 0
    assert capfd.readouterr().out.endswith("\nstopped after step 3 (--until 3): --resume continues from there\n")
    assert read_outcome(run_dir)["finished"] is False
    assert main(["train", str(run_dir), "--ranks", "2", "--resume", "--until", "2"]) == 0
    assert capfd.readouterr().out.endswith("\nnothing was trained: step 3 is past --until 2 already\n")
    assert (run_dir / "tokenizer.model").read_bytes() == (corpus / "tokenizer.model").read_bytes()
    start, _ = json.loads((run_dir / "environment.json").read_text())["starts"]
    digest = hashlib.sha256((corpus / "manifest.json").read_bytes()).hexdigest()
    assert start["corpora"] == [{"path": str(corpus.resolve()), "sha256": digest}]
    assert main(["train", str(run_dir), "--ranks", "2", "--resume", "--json", str(report)]) == 0
    outcome = read_outcome(run_dir)
    assert outcome["finished"] is True
    assert outcome["step"] == 6
    assert '"validation_bits_per_byte"' in report.read_text()
    assert load_weights(newest_valid(run_dir))
    said = capfd.readouterr()
    assert "tokens/s" in said.out
    assert said.out.endswith("\nfinished: all 6 steps are done\n")
    assert "WARNING" not in said.out + said.err


@pytest.mark.ranks
def test_the_last_line_names_ctrl_c_as_the_reason(recipe_file, tmp_path):
    changes = ["train.steps=5000", "evaluation.every=5000", "checkpoint.every=5000", "schedule.warmup_steps=2"]
    run_dir = tmp_path / "run"
    command = [*BST, "train", str(recipe_file()), *changes, "--run-dir", str(run_dir), "--ranks", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        while not read_lines(run_dir / "metrics.jsonl"):
            assert run.poll() is None, run.communicate()
            time.sleep(0.1)
        run.send_signal(signal.SIGINT)
        out, err = run.communicate(timeout=300)
    assert run.returncode == 75
    assert "told to stop (SIGINT)" in err
    outcome = read_outcome(run_dir)
    assert outcome["stopped"] == "SIGINT"
    assert (
        out.splitlines()[-1] == f"stopped after step {outcome['step']} (Ctrl-C, SIGINT): --resume continues from there"
    )
    assert out.count("stopped after") == 1


def test_the_last_line_says_why_a_start_ended():
    assert closing({"step": 1200}, 1200) == "finished: all 1,200 steps are done"
    assert closing({"step": 7}, 9, 7) == "stopped after step 7 (--until 7): --resume continues from there"
    assert closing({"step": 7}, 9, 3) == "nothing was trained: step 7 is past --until 3 already"
    told = {"step": 9, "stopped": "SIGUSR1"}  # its last evaluation is missing
    assert closing(told, 9) == "stopped after step 9 (SIGUSR1): --resume continues from there"


def test_a_recipe_that_the_system_cannot_read_is_worth_another_start():
    """A rank's status decides whether `bst launch` restarts the run. /proc/self/mem gives an error, also to root."""
    done = subprocess.run([sys.executable, "-m", "bst_dist.train", "/proc/self/mem"], capture_output=True, text=True)
    assert done.returncode == UNREADABLE, done.stderr
    assert "cannot read /proc/self/mem: Input/output error" in done.stderr
