"""The launcher's status is the truth, and nothing it started outlives it."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from bst_dist.cli import main
from bst_dist.cluster import local
from bst_dist.train.checkpoint import load_weights, newest_valid
from bst_dist.train.rundir import read_outcome

# A launcher that starts one rank, which sleeps, and writes down its process id; what it does then is up to the test.
LAUNCHER = """
import os, signal, subprocess, sys, time
rank = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open(sys.argv[1] + ".new", "w").write(str(rank.pid)); os.rename(sys.argv[1] + ".new", sys.argv[1])
{then}
"""


def run(tmp_path: Path, then: str) -> tuple[int, psutil.Process | None]:
    """The status, and the rank that was started if it still lives."""
    status = local.launch([sys.executable, "-c", LAUNCHER.format(then=then), str(tmp_path / "rank")], dict(os.environ))
    pid = int((tmp_path / "rank").read_text())
    alive = psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return status, psutil.Process(pid) if alive else None


@pytest.mark.parametrize(
    ("then", "status"),
    [
        ("rank.kill(); rank.wait()", 0),
        ("rank.kill(); rank.wait(); sys.exit(3)", 3),
        ("sys.exit(0)", 1),  # says all is well, but leaves a rank behind
        ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
    ],
)
def test_status_is_the_launchers_own_unless_it_leaves_ranks_behind(tmp_path, then, status):
    assert run(tmp_path, then) == (status, None)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_launcher_and_ranks(tmp_path, number):
    def send() -> None:
        while not (tmp_path / "rank").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    threading.Thread(target=send, daemon=True).start()
    assert run(tmp_path, "time.sleep(60)") == (128 + number, None)


def test_ranks_that_will_not_end_are_made_to(tmp_path, monkeypatch):
    monkeypatch.setattr(local, "GRACE_S", 0.5)
    stubborn = LAUNCHER.replace("import time; time", "import signal, time; signal.signal(15, signal.SIG_IGN); time")
    monkeypatch.setitem(globals(), "LAUNCHER", stubborn)
    assert run(tmp_path, "time.sleep(1)") == (1, None)


@pytest.mark.ranks
def test_bst_train_trains_resumes_and_reports(recipe_file, tmp_path, capfd):
    recipe, run_dir, report = str(recipe_file()), tmp_path / "run", tmp_path / "report.json"
    assert main(["train", recipe, "--run-dir", str(run_dir), "--ranks", "2", "--until", "3"]) == 0
    assert read_outcome(run_dir)["finished"] is False
    command = ["train", recipe, "--run-dir", str(run_dir), "--ranks", "2", "--resume", "--json", str(report)]
    assert main(command) == 0
    outcome = read_outcome(run_dir)
    assert outcome["finished"] is True
    assert outcome["step"] == 6
    assert '"validation_bits_per_byte"' in report.read_text()
    assert load_weights(newest_valid(run_dir))
    said = capfd.readouterr()
    assert "tokens/s" in said.out
    assert "WARNING" not in said.out + said.err
