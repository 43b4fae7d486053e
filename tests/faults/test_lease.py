"""Only one start at a time trains in a run directory; another can take it over when the first is dead."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bst_base.errors import StorageError
from bst_dist.checkpoint.directory import committed, step_of
from bst_dist.faults import lease
from bst_dist.faults.lease import LEASE, LeaseError, acquire, is_held
from bst_dist.faults.status import DONE, FAILED, USER_ERROR

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(lease, "BEAT_S", 0.05)


def held_elsewhere(run_dir: Path, epoch: int = 4, **about: Any) -> Path:
    """Write the lease of a start on another machine; return its path."""
    path = run_dir / LEASE / f"epoch-{epoch:08d}.json"
    path.parent.mkdir(parents=True)
    path.write_text(
        json.dumps(
            {
                "host": "node-03",
                "pid": 7,
                "job": "Slurm job 4711",
                "machine": "other",
                "started": "1",
                "time": "2026-01-01T00:00:00Z",
                "beats": 1,
                **about,
            }
        )
    )
    return path


def test_a_second_start_is_refused_and_names_the_first(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    first = acquire(tmp_path)
    with pytest.raises(LeaseError, match=rf"process {os.getpid()} on .* \(Slurm job 4711, since .*epoch 1"):
        acquire(tmp_path)
    first.release()
    assert acquire(tmp_path).epoch == 2


def test_a_dead_process_of_this_machine_is_replaced_at_once(tmp_path):
    code = "import sys; from bst_dist.faults.lease import *; from pathlib import Path; acquire(Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", f"{code}; os._exit(9)", str(tmp_path)], check=False)
    said: list[str] = []
    assert acquire(tmp_path, silence_s=1e9, say=said.append).epoch == 2
    assert "is no longer running: this start takes over the run directory (epoch 2)" in said[0]


def test_a_start_elsewhere_is_dead_when_its_counter_stands_still(tmp_path):
    held_elsewhere(tmp_path)
    said: list[str] = []
    assert acquire(tmp_path, silence_s=0.2, say=said.append).epoch == 5
    assert "process 7 on node-03 (Slurm job 4711" in said[0]
    assert len(list((tmp_path / LEASE).glob("*.json"))) == 1


def test_a_start_elsewhere_whose_counter_moves_is_not_replaced(tmp_path, monkeypatch):
    path = held_elsewhere(tmp_path)
    monkeypatch.setattr(lease.time, "sleep", lambda _: path.write_text(path.read_text().replace("1}", "2}")))
    with pytest.raises(LeaseError, match="node-03"):
        acquire(tmp_path, silence_s=1e9)


def test_only_one_of_two_starts_replaces_a_dead_one(tmp_path, monkeypatch):
    held_elsewhere(tmp_path)
    winners = []

    def lives(*_: Any) -> bool:
        if not winners:
            winners.append(None)
            winners[0] = acquire(tmp_path)
        return False

    monkeypatch.setattr(lease, "_lives", lives)
    with pytest.raises(LeaseError, match=f"process {os.getpid()}"):
        acquire(tmp_path)
    assert winners[0].epoch == 5


def test_a_lease_that_is_not_there_is_an_unmounted_directory_and_not_a_successor(tmp_path):
    told: list[str] = []
    held = acquire(tmp_path, told.append)
    away = (tmp_path / LEASE).rename(tmp_path / "away")
    with pytest.raises(StorageError, match="this start's lease is not there: is the file system still mounted"):
        held.require()
    away.rename(tmp_path / LEASE)
    held.require()
    held.release()
    assert not told


def test_a_replaced_start_learns_of_its_successor(tmp_path):
    lost: list[str] = []
    old = acquire(tmp_path, lost.append)
    held_elsewhere(tmp_path / "other", epoch=2).rename(tmp_path / LEASE / "epoch-00000002.json")
    with pytest.raises(LeaseError, match=re.escape("taken over by process 7 on node-03")):
        old.require()
    old._thread.join(60)
    assert "epoch 2, this start has 1" in lost[0]
    old.release()  # must not touch the other's lease
    assert "released" not in (tmp_path / LEASE / "epoch-00000002.json").read_text()


BIN = Path(sys.executable).parent
MPIRUN = ("mpirun", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n", "2")
STARTS = {
    "bst train": [BIN / "bst", "train", "--ranks", "2"],
    "torchrun": [BIN / "torchrun", "--standalone", "--nproc-per-node", "2", "-m", "bst_dist.train"],
    "mpirun": [BIN / MPIRUN[0], *MPIRUN[1:], sys.executable, "-m", "bst_dist.train"],
}
"""Ways to start two ranks on this machine. srun is in cluster/test_slurm.py."""


@pytest.mark.ranks
@pytest.mark.parametrize("way", STARTS)
def test_a_second_trainer_on_one_directory_is_refused(older, way):
    """The first is suspended during its run, so that the second finds it alive."""
    if not Path(STARTS[way][0]).exists():
        pytest.skip(f"no {way} on this machine")
    words = ["run/recipe.yaml", "--resume", "--run-dir", "run"]
    command = again = [*STARTS[way], *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": environment}
    first = subprocess.Popen(command, cwd=older.parent, **output)
    while not (files := list((older / LEASE).glob("epoch-*.json"))) or not files[0].read_text().endswith("}"):
        assert first.poll() is None, first.communicate()
        time.sleep(0.02)
    rank = json.loads(files[0].read_text())["pid"]
    os.kill(rank, signal.SIGSTOP)
    try:
        done = subprocess.run(again, cwd=older.parent, timeout=400, **output)
        # torchrun has its own exit status, whatever its ranks' statuses are.
        assert done.returncode == (FAILED if "torch" in way else USER_ERROR), done.stdout
        assert f"bst train: run: process {rank} on " in done.stdout
        assert "trains there (epoch 1)" in done.stdout
    finally:
        os.kill(rank, signal.SIGCONT)
    said, _ = first.communicate(timeout=400)
    assert first.returncode == DONE, said
    assert [step_of(path) for path in committed(older)] == [6, 4]


def test_a_lease_is_held_from_the_start_to_its_release(tmp_path):
    assert not is_held(tmp_path)
    own = acquire(tmp_path)
    assert is_held(tmp_path)
    own.release()
    assert not is_held(tmp_path)


@pytest.mark.parametrize(
    "age_s, text, held",
    [
        (1.0, '{"beats": 3}', True),
        (600.0, '{"beats": 3}', False),
        (1.0, '{"beats":3,"released":true}', False),
        (1.0, "", True),
    ],
)
def test_whether_a_lease_is_held_depends_on_its_age_and_content(tmp_path, age_s, text, held):
    """An empty file is of a start that has just begun; how the JSON is spaced does not matter."""
    path = held_elsewhere(tmp_path)
    path.write_text(text)
    os.utime(path, (time.time() - age_s,) * 2)
    assert is_held(tmp_path) == held


def test_the_newest_start_decides_whether_a_lease_is_held(tmp_path):
    path = held_elsewhere(tmp_path, epoch=4)
    path.with_name("epoch-00000005.json").write_text(json.dumps({"released": True}))
    assert not is_held(tmp_path)
