"""Checkpoints on disk: which exist, which are whole, and what they hold.

    checkpoints/step-00000100/manifest.json        written last; names every file with its size and digest
                             /weights.safetensors  full single-precision weights, for evaluation and export
                             /engine/              DeepSpeed's files: weights and optimizer, sharded over ranks
                             /rank-00000.pt        what one rank alone knows: random generators, the carried past

A checkpoint is written under the name ``step-00000100.partial`` and renamed when it is whole, so a directory without
that suffix was complete once; its digests tell whether it still is. Writing and loading it is `snapshot`'s part.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors.torch import load_file

from data_pipeline.config import Config
from data_pipeline.errors import UserError

CHECKPOINTS, MANIFEST, WEIGHTS, ENGINE = "checkpoints", "manifest.json", "weights.safetensors", "engine"
PARTIAL, DELETED, DAMAGED = ".partial", ".deleted", ".damaged"
FORMAT = 1


class CheckpointConfig(Config):
    every: int = Field(500, ge=0)
    """Steps between checkpoints; the last step always leaves one; 0: only that one."""
    keep_last: int = Field(2, ge=1)
    """How many to keep; older ones are removed once a newer one is committed."""
    at: tuple[int, ...] = ()
    """Steps that have a checkpoint whatever `every` says, kept for good: where branches leave this run."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, or of another run."""


def directory(run_dir: Path, step: int) -> Path:
    """Where the checkpoint taken after `step` steps lies."""
    return run_dir / CHECKPOINTS / f"step-{step:08d}"


def rank_file(rank: int) -> str:
    """Name, inside a checkpoint, of what one rank alone knows."""
    return f"rank-{rank:05d}.pt"


def committed(run_dir: Path) -> list[Path]:
    """Checkpoints that were completed, newest first; whether they still are whole is not looked at."""
    found = (run_dir / CHECKPOINTS).glob("step-*")
    return sorted((path for path in found if re.fullmatch(r"step-\d{8,}", path.name)), key=step_of, reverse=True)


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a checkpoint; raises CheckpointError when there is none that can be read."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{checkpoint}: {MANIFEST} cannot be read: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{checkpoint}: not a checkpoint that this program reads (format {FORMAT})")
    return manifest


def damage(checkpoint: Path, part: int = 0, parts: int = 1) -> list[str]:
    """What is wrong with a checkpoint's files, empty when nothing; of `parts` readers, this is number `part`."""
    try:
        files = read_manifest(checkpoint)["files"]
    except CheckpointError as error:
        return [str(error)]
    found = []
    for name in sorted(files)[part::parts]:
        path, record = checkpoint / name, files[name]
        if not path.is_file():
            found.append(f"{name} is missing")
        elif (size := path.stat().st_size) != record["bytes"]:
            found.append(f"{name} has {size} bytes instead of {record['bytes']}")
        elif _sha256(path) != record["sha256"]:
            found.append(f"{name} is damaged: its digest differs")
    return found


def newest_valid(run_dir: Path) -> Path:
    """The newest checkpoint whose files are all as they were written; raises CheckpointError when there is none."""
    passed_over = []
    for checkpoint in committed(run_dir):
        if not (found := damage(checkpoint)):
            return checkpoint
        passed_over.append(f"  {checkpoint.name}: {found[0]}")
    raise CheckpointError("\n".join([f"{run_dir}: no valid checkpoint", *passed_over]))


def load_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Full single-precision weights by parameter name, whatever the ZeRO stage they were trained under."""
    return load_file(checkpoint / WEIGHTS)


def set_aside(checkpoint: Path) -> None:
    """Take its name from a damaged checkpoint; what is left of it stays beside, in place of what stood there before."""
    aside = checkpoint.with_name(checkpoint.name + DAMAGED)
    shutil.rmtree(aside, ignore_errors=True)
    checkpoint.rename(aside)


def retain(run_dir: Path, config: CheckpointConfig) -> None:
    """Remove what is left of broken-off writes, and all but the newest checkpoints and those that are kept for good.

    Called when the newest has just been committed with its digests, so a valid one always stays. A checkpoint is
    renamed before it is removed: half of one never bears a checkpoint's name.
    """
    for checkpoint in committed(run_dir)[config.keep_last :]:
        if step_of(checkpoint) in config.at:
            continue
        checkpoint.rename(checkpoint.with_name(checkpoint.name + DELETED))
    for suffix in (PARTIAL, DELETED):
        for left in (run_dir / CHECKPOINTS).glob(f"step-*{suffix}"):
            shutil.rmtree(left)


def step_of(path: Path) -> int:
    """The steps that had been taken when a checkpoint was."""
    return int(path.name.removeprefix("step-"))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
