"""Training on a disk that fills up: one message, an exit status that means to start again, nothing lost."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bst_dist.checkpoint.directory import committed, newest_valid
from bst_dist.faults.status import DONE, UNREADABLE
from bst_dist.report.metrics import FILE

pytestmark = [
    pytest.mark.ranks,
    pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system, which root alone may"),
]
LONG = (
    "train",
    "run/recipe.yaml",
    "--run-dir",
    "disk/run",
    "--resume",
    "train.steps=100000",
    "checkpoint.every=20",
    "log.tensorboard=true",
    "log.sample_tokens=0",
    "evaluation.every=0",
)


@pytest.fixture
def disk(tmp_path: Path, older: Path) -> Iterator[Path]:
    """A separate file system of 4 MB, next to an older run's recipe and corpus."""
    place = tmp_path / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(place)], check=True)
    yield place
    subprocess.run(["umount", str(place)], check=True)


def fill(disk: Path) -> None:
    with (disk / "filler").open("wb", buffering=0) as file:
        while free := shutil.disk_usage(disk).free:
            file.write(bytes(free))


@pytest.mark.long
def test_a_disk_that_fills_up_while_training_ends_a_resumable_run(bst, disk):
    command = [Path(sys.executable).with_name("bst"), *LONG]
    run = disk / "run"
    trainer = subprocess.Popen(command, cwd=disk.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not (run / "checkpoints").exists() or not committed(run):
        assert trainer.poll() is None, trainer.communicate()
        time.sleep(0.1)
    fill(disk)
    said, _ = trainer.communicate(timeout=600)
    assert trainer.returncode == UNREADABLE, said
    assert "Traceback" not in said
    lines = [line for line in said.splitlines() if line.startswith("bst train:")]
    assert "No space left on device" in lines[0] or "the disk is full" in lines[0]
    assert newest_valid(run)
    done = bst(*LONG)
    assert done.returncode == UNREADABLE, done.stdout
    assert "Traceback" not in done.stdout
    (disk / "filler").unlink()
    reached = int(newest_valid(run).name[-8:])
    done = bst(*LONG, "--until", reached + 20)
    assert done.returncode == DONE, done.stdout
    assert f"resumed from step {reached}" in done.stdout
    assert (run / FILE).read_text().endswith("}\n")
