"""Runs `bst ckpt push` and `pull`, and gives a run further checkpoints."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

from bst_dist.checkpoint.directory import directory, read_manifest
from bst_dist.checkpoint.retention import CheckpointEntry, keep_only_weights
from bst_dist.cli import main


def push(run: Path, url: str, *more: str) -> int:
    return main(["ckpt", "push", str(run), url, *more])


def pull(url: str, run: Path, *more: str) -> int:
    return main(["ckpt", "pull", url, str(run), *more])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def earlier(run: Path, step: int) -> None:
    """Give the run a valid checkpoint of an earlier step."""
    shutil.copytree(directory(run, 4), directory(run, step))


def taken(run: Path, step: int, content: bytes = b"other", **manifest: object) -> None:
    """Give the run a valid checkpoint of `step` with another content, and other entries in its manifest."""
    made = directory(run, step)
    if not made.exists():
        shutil.copytree(directory(run, 4), made)
    (made / "rank-00000.pt").write_bytes(content)
    changed = read_manifest(made) | manifest
    changed["files"]["rank-00000.pt"] |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (made / "manifest.json").write_text(json.dumps(changed))


def only_weights(run: Path, step: int) -> None:
    """Give the run a checkpoint of the weights only."""
    earlier(run, step)
    keep_only_weights(CheckpointEntry(directory(run, step), read_manifest(directory(run, step))))
