"""Files that a host cannot see do not count as damaged: nothing is renamed, removed or restarted because of them."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from bst_base.host import free_port
from bst_base.json_lines import read_lines
from bst_dist.checkpoint.directory import FORMAT, MANIFEST, committed, directory, examine
from bst_dist.faults.status import DONE, UNREADABLE, USER_ERROR
from bst_dist.report.metrics import FILE

pytestmark = pytest.mark.ranks
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts file systems, which root alone may")
RESUME = ("train", "run/recipe.yaml", "--resume", "--run-dir", "run")
HOST = socket.gethostname()


def hidden(path: Path) -> tuple[str, ...]:
    """Return a command prefix that hides `path` under an empty file system, as on a host whose mount failed."""
    return ("unshare", "--mount", "sh", "-c", f'mount -t tmpfs none {path}; exec "$@"', "sh")


# Without these capabilities, root must obey file permissions.
PLAIN_USER = ("setpriv", "--bounding-set", "-dac_override,-dac_read_search")


def tree(run_dir: Path) -> dict[str, bytes]:
    left_out = ("heartbeats", "stacks", "lease")
    return {
        str(path): path.read_bytes()
        for path in run_dir.rglob("*")
        if path.is_file() and not any(part.startswith(left_out) for part in path.parts)
    }


@needs_root
def test_hidden_checkpoints_do_not_let_a_run_begin_at_step_0(bst, older):
    before = tree(older)
    done = bst(*RESUME, "--ranks", 2, under=hidden(older / "checkpoints"))
    assert done.returncode == UNREADABLE, done.stdout
    assert f"outcome.json says that step 4 was reached, but {HOST} sees no checkpoint in run/checkpoints" in done.stdout
    assert "--from-zero" in done.stdout
    assert tree(older) == before


@needs_root
def test_a_file_that_may_not_be_read_is_named_with_its_host(bst, older):
    before = tree(older)
    unreadable = directory(older, 4) / "weights-00001.safetensors"
    unreadable.chmod(0)
    done = bst(*RESUME, "--ranks", 2, under=PLAIN_USER)
    assert done.returncode == UNREADABLE, done.stdout
    path = unreadable.relative_to(older.parent)
    assert f"bst train: {HOST} cannot read {path}: Permission denied" in done.stdout
    unreadable.chmod(0o644)
    assert tree(older) == before


@needs_root
def test_checkpoints_that_may_not_be_listed_are_not_treated_as_missing(bst, older):
    (older / "checkpoints").chmod(0)
    done = bst(*RESUME, under=PLAIN_USER)
    assert done.returncode == UNREADABLE, done.stdout
    assert f"{HOST} cannot read run/checkpoints: Permission denied" in done.stdout
    assert bst("ckpt", "gc", "run", "--delete", under=PLAIN_USER).returncode == UNREADABLE


@needs_root
def test_files_that_one_host_of_two_does_not_see_are_not_treated_as_lost(older):
    before = tree(older)
    master = f"127.0.0.1:{free_port()}"
    bst = str(Path(sys.executable).with_name("bst"))
    nodes = [
        subprocess.Popen(
            [*under, bst, *RESUME, "--ranks", "1", "--nodes", "2", "--node", str(node), "--master", master],
            cwd=older.parent,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for node, under in enumerate([(), hidden(directory(older, 4))])
    ]
    said = [node.communicate(timeout=600)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [UNREADABLE] * 2, said
    assert "checkpoint 4: rank 1 on" in said[0]
    assert "does not see the same file; nothing was changed" in said[0]
    assert tree(older) == before


def test_a_checkpoint_of_a_newer_version_is_not_set_aside(bst, older):
    shutil.copytree(directory(older, 4), newer := directory(older, 5))
    manifest = newer / MANIFEST
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": FORMAT + 1}))
    before = tree(older)
    done = bst(*RESUME, "--ranks", 2)
    assert done.returncode == USER_ERROR, done.stdout
    assert "step-00000005: written by another version of this program" in done.stdout
    assert tree(older) == before


def test_bad_checkpoints_are_named_and_from_zero_keeps_old_metrics(bst, older):
    path = directory(older, 4) / "weights-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    what = "checksum mismatch in rank 1's file weights-00001.safetensors"
    assert [str(finding) for finding in examine(directory(older, 4))] == [what]
    reported = read_lines(older / FILE)
    done = bst(*RESUME, "--ranks", 2)
    assert done.returncode == USER_ERROR, done.stdout
    assert f"checkpoint 4: {what}; no older checkpoint is valid" in done.stdout
    assert done.stdout.count("start at step 0 with --from-zero") == 1, done.stdout  # printed once, not by each rank
    assert [path.name for path in (older / "checkpoints").iterdir()] == ["step-00000004.damaged"]
    assert read_lines(older / FILE) == reported
    done = bst(*RESUME, "--ranks", 2, "--from-zero")
    assert done.returncode == DONE, done.stdout
    dropped = read_lines(older / "metrics.dropped.jsonl")
    assert [{key: line[key] for key in line if key != "dropped"} for line in dropped] == reported
    assert len(committed(older)) == 2
