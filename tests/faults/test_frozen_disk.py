"""Training on a frozen disk: the hanging file system is named, and nothing waits for it forever."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bst_dist.checkpoint.directory import committed
from bst_dist.faults.status import DONE, HUNG, UNREADABLE
from bst_dist.train.rundir import read_outcome

pytestmark = [
    pytest.mark.ranks,
    pytest.mark.skipif(os.geteuid() != 0, reason="mounts and freezes a file system, which root alone may"),
]
END_S = 300
"""Timeout for the program to end, far more than it needs; it only detects an endless wait."""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A separate ext4 file system, which is thawed at the end."""
    if not all(map(shutil.which, ("mkfs.ext4", "fsfreeze", "mount"))):
        pytest.skip("needs mkfs.ext4, fsfreeze and mount")
    image, place = tmp_path / "image", tmp_path / "disk"
    place.mkdir()
    with image.open("wb") as file:
        file.truncate(64 << 20)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    mounted = subprocess.run(["mount", "-o", "loop", image, place], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no loop device can be had here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["fsfreeze", "-u", place], capture_output=True)  # fails if it is already thawed
    deadline = time.monotonic() + 300
    while subprocess.run(["umount", place], capture_output=True).returncode:
        assert time.monotonic() < deadline, "something still uses the file system"
        time.sleep(0.2)


class Trainer:
    """`bst train` on two ranks, with the run directory on the disk; its output goes elsewhere."""

    def __init__(self, recipe: Path, disk: Path, *words: str) -> None:
        self.run, self.log = disk / "run", disk.parent / "said"
        command = [
            Path(sys.executable).with_name("bst"),
            "train",
            recipe,
            "--run-dir",
            self.run,
            "--ranks",
            "2",
            "--resume",
            *words,
        ]
        with self.log.open("w") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=file)

    def until_it_has_a_checkpoint(self) -> None:
        while not (self.run / "checkpoints").exists() or not committed(self.run):
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.1)

    def status(self) -> int:
        try:
            return self.process.wait(END_S)
        finally:
            self.process.kill()


def freeze(disk: Path, thaw: bool = False) -> None:
    subprocess.run(["fsfreeze", "-u" if thaw else "-f", disk], check=True)


@pytest.fixture
def recipe(recipe_file) -> Path:
    return recipe_file(train={"steps": 100_000}, checkpoint={"every": 5, "keep_last": 2}, watchdog={"limit_s": 20})


@pytest.mark.long
def test_the_watchdog_names_the_file_system_and_ends_a_resumable_run(recipe, disk):
    trainer = Trainer(recipe, disk)
    trainer.until_it_has_a_checkpoint()
    freeze(disk)
    status, said = trainer.status(), trainer.log.read_text()
    assert status == HUNG, said
    assert "bst train: no rank has moved for" in said
    assert f"the file system hangs: {trainer.run} has not answered for" in said
    assert "cannot write stacks to" in said
    assert "thread MainThread (0x" in said  # so they are printed
    freeze(disk, thaw=True)
    reached = max(int(path.name[-8:]) for path in committed(trainer.run))
    again = Trainer(recipe, disk, "--until", str(reached + 1))
    assert again.status() == DONE, again.log.read_text()
    assert f"resumed from step {reached}" in again.log.read_text()


def test_two_signals_end_a_run_whose_disk_hangs(recipe, disk):
    trainer = Trainer(recipe, disk, "watchdog.limit_s=0")
    trainer.until_it_has_a_checkpoint()
    freeze(disk)
    trainer.process.send_signal(signal.SIGTERM)
    time.sleep(5)
    assert trainer.process.poll() is None, "one signal waits for the checkpoint"
    deadline, twice = time.monotonic() + 300, "told to stop (SIGTERM) more than once"
    while twice not in trainer.log.read_text() and time.monotonic() < deadline:
        trainer.process.send_signal(signal.SIGTERM)  # within 3 s it counts as a copy of the first
        time.sleep(1)  # a signal during exit would end the process by that signal
    status, said = trainer.status(), trainer.log.read_text()
    assert status == UNREADABLE, said
    assert twice in said
    assert f"{trainer.run} has not answered for" in said
    assert read_outcome(trainer.run) is None
