"""Checkpoints on disk: which exist, which are whole, and what they hold.

    checkpoints/step-00000100/manifest.json               written last; names every file with its size and digest
                             /weights-00000.safetensors   single-precision weights, a file a rank
                             /optimizer-00000.safetensors both moments of Adam, a file a rank
                             /rank-00000.pt               what one rank alone knows: generators, the carried past
                             /pinned                      there when the checkpoint is to be kept for good

A checkpoint is written under the name ``step-00000100.partial`` and renamed when it is whole, so a directory without
that suffix was complete once; its digests tell whether it still is. A checkpoint of the weights alone has no optimizer
files: it can be evaluated and exported, but nothing goes on from it.

Writing is `saving`'s part, going on from one `snapshot`'s, what is kept `retention`'s.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from bst_base.errors import UserError
from bst_dist.checkpoint.shards import Shards

CHECKPOINTS, MANIFEST, PINNED = "checkpoints", "manifest.json", "pinned"
WEIGHTS, OPTIMIZER = "weights", "optimizer"
PARTIAL, DELETED, DAMAGED = ".partial", ".deleted", ".damaged"
FORMAT = 2


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, or of another run."""


class OlderFormatError(CheckpointError):
    """A whole checkpoint, as an older version of this program wrote them."""


def directory(run_dir: Path, step: int) -> Path:
    """Where the checkpoint taken after `step` steps lies."""
    return run_dir / CHECKPOINTS / f"step-{step:08d}"


def shard_file(kind: str, rank: int) -> str:
    """Name, inside a checkpoint, of a rank's shard of the WEIGHTS or of the OPTIMIZER's states."""
    return f"{kind}-{rank:05d}.safetensors"


def rank_file(rank: int) -> str:
    """Name, inside a checkpoint, of what one rank alone knows."""
    return f"rank-{rank:05d}.pt"


def committed(run_dir: Path) -> list[Path]:
    """Checkpoints that were completed, newest first; whether they still are whole is not looked at."""
    found = (run_dir / CHECKPOINTS).glob("step-*")
    return sorted((path for path in found if re.fullmatch(r"step-\d{8,}", path.name)), key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """The steps that had been taken when a checkpoint was."""
    return int(path.name.removeprefix("step-"))


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a checkpoint; raises CheckpointError when there is none that can be read."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{checkpoint}: {MANIFEST} cannot be read: {error}") from None
    if isinstance(manifest, dict) and manifest.get("format") in range(1, FORMAT):
        raise OlderFormatError(
            f"{checkpoint}: written by an older version of this program, in format {manifest['format']}; this one "
            f"reads format {FORMAT}: go on with the version that wrote it, or start anew in another --run-dir"
        )
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{checkpoint}: not a checkpoint that this program reads (format {FORMAT})")
    return manifest


def is_full(manifest: dict[str, Any]) -> bool:
    """Whether a run can go on from the checkpoint: it has more than the weights."""
    return any(name.startswith(f"{OPTIMIZER}-") for name in manifest["files"])


def size(manifest: dict[str, Any]) -> int:
    """Bytes of a checkpoint's files."""
    return sum(record["bytes"] for record in manifest["files"].values())


def damage(checkpoint: Path, part: int = 0, parts: int = 1, digests: bool = True) -> list[str]:
    """What is wrong with a checkpoint's files, empty when nothing; of `parts` readers, this is number `part`.

    Without `digests` nothing is read: what is missing or cut off is found, what was changed is not. Raises
    OlderFormatError: such a checkpoint is no reason to take its steps again.
    """
    try:
        files = read_manifest(checkpoint)["files"]
    except OlderFormatError:
        raise
    except CheckpointError as error:
        return [str(error)]
    found = []
    for name in sorted(files)[part::parts]:
        path, record = checkpoint / name, files[name]
        if not path.is_file():
            found.append(f"{name} is missing")
        elif (bytes_ := path.stat().st_size) != record["bytes"]:
            found.append(f"{name} has {bytes_} bytes instead of {record['bytes']}")
        elif digests and _sha256(path) != record["sha256"]:
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


def open_shards(checkpoint: Path, kind: str) -> Shards:
    """All ranks' shards of the WEIGHTS or of the OPTIMIZER's states; raises CheckpointError when there are none."""
    names = [name for name in read_manifest(checkpoint)["files"] if name.startswith(f"{kind}-")]
    if not names:
        raise CheckpointError(f"{checkpoint}: of the weights alone, without {kind} files")
    return Shards(checkpoint / name for name in sorted(names))


def load_weights(checkpoint: Path) -> dict[str, Tensor]:
    """Full single-precision weights by parameter name, whatever the layout they were trained under."""
    weights = open_shards(checkpoint, WEIGHTS)
    return {name: weights.whole(name) for name in weights.shapes}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
