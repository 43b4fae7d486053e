"""Checkpoints on disk: which exist, which are whole, and what they hold.

    checkpoints/step-00000100/manifest.json               written last; names every file with its size and digest
                             /weights-00000.safetensors   single-precision weights, a file a rank
                             /optimizer-00000.safetensors both moments of Adam, or Muon's momentum, a file a rank
                             /averaged-00000.safetensors  where train.average is set: averaged weights, a file a rank
                             /rank-00000.pt               what one rank alone knows: generators, the carried past
                             /pinned                      there when the checkpoint is to be kept for good

A checkpoint is written under the name ``step-00000100.partial`` and renamed when it is whole, so a directory without
that suffix was complete once; its digests tell whether it still is. A checkpoint of the weights alone has no optimizer
files: it can be evaluated and exported, but nothing continues from it.

Writing is `saving`'s part, continuing from one `snapshot`'s, what is kept `retention`'s.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bst_base.errors import StorageError, UserError
from bst_dist.checkpoint.index import Index, Indexed
from bst_dist.checkpoint.shards import Headers, Shards

if TYPE_CHECKING:
    from torch import Tensor

CHECKPOINTS, MANIFEST, PINNED = "checkpoints", "manifest.json", "pinned"
WEIGHTS, OPTIMIZER, AVERAGED = "weights", "optimizer", "averaged"
WEIGHT, MOMENTS, AVERAGE = "weight", ("exp_avg", "exp_avg_sq"), "average"
TENSORS = {WEIGHTS: (WEIGHT,), OPTIMIZER: MOMENTS, AVERAGED: (AVERAGE,)}
"""What the files of each kind hold of every parameter, in this order; Muon's matrices have the first moment alone."""
PARTIAL, DELETED, DAMAGED = ".partial", ".deleted", ".damaged"
INDEX = "index"
FORMAT = 2
MISSING = "missing:"


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, or of another run."""


class OlderFormatError(CheckpointError):
    """A whole checkpoint, as an older version of this program wrote them."""


def directory(run_dir: Path, step: int) -> Path:
    """Where the checkpoint taken after `step` steps lies."""
    return run_dir / CHECKPOINTS / f"step-{step:08d}"


def shard_file(kind: str, rank: int) -> str:
    """Name, inside a checkpoint, of a rank's shard of the WEIGHTS, the OPTIMIZER's states or the AVERAGED weights."""
    return f"{kind}-{rank:05d}.safetensors"


def stored_name(parameter: str, tensor: str) -> str:
    """A parameter's name in a shard; its moments have their own beside it."""
    return parameter if tensor in (WEIGHT, AVERAGE) else f"{tensor}/{parameter}"


def rank_file(rank: int) -> str:
    """Name, inside a checkpoint, of what one rank alone knows."""
    return f"rank-{rank:05d}.pt"


def committed(run_dir: Path) -> list[Path]:
    """Checkpoints that were completed, newest first; whether they still are whole is not looked at.

    Raises StorageError when this host cannot tell.
    """
    names = (name for name in entries(run_dir) if re.fullmatch(r"step-\d{8,}", name))
    return sorted((run_dir / CHECKPOINTS / name for name in names), key=step_of, reverse=True)


def entries(run_dir: Path) -> list[str]:
    """Names of all that lies beside the checkpoints of a run; raises StorageError when this host cannot tell."""
    try:
        return [path.name for path in (run_dir / CHECKPOINTS).iterdir()]  # glob takes what may not be read for empty
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StorageError.of(error, run_dir / CHECKPOINTS) from None


def step_of(path: Path) -> int:
    """The steps that had been taken when a checkpoint was."""
    return int(path.name.removeprefix("step-"))


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a checkpoint.

    Raises CheckpointError when there is none, or it is none that this program reads, and StorageError when this host
    cannot tell.
    """
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{checkpoint}: {MANIFEST} is missing") from None
    except OSError as error:
        raise StorageError.of(error, checkpoint / MANIFEST) from None
    except ValueError as error:
        raise CheckpointError(f"{checkpoint}: {MANIFEST} is not JSON: {error}") from None
    if isinstance(manifest, dict) and manifest.get("format") in range(1, FORMAT):
        raise OlderFormatError(
            f"{checkpoint}: written by an older version of this program, in format {manifest['format']}; this one "
            f"reads format {FORMAT}: continue with the version that wrote it, or start a new run in another --run-dir"
        )
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{checkpoint}: not a checkpoint that this program reads (format {FORMAT})")
    return manifest


def is_full(manifest: dict[str, Any]) -> bool:
    """Whether a run can continue from the checkpoint: it has more than the weights."""
    return has(manifest, OPTIMIZER)


def has(manifest: dict[str, Any], kind: str) -> bool:
    """Whether a checkpoint has files of a kind: WEIGHTS, OPTIMIZER or AVERAGED."""
    return any(name.startswith(f"{kind}-") for name in manifest["files"])


def size(manifest: dict[str, Any]) -> int:
    """Bytes of a checkpoint's files."""
    return sum(record["bytes"] for record in manifest["files"].values())


@dataclass(frozen=True)
class Finding:
    """Something that is wrong with one file of a checkpoint."""

    file: str
    what: str
    """As it stands before the file's name: `checksum mismatch in`."""
    rank: int | None = None
    """Who wrote the file, and on which host, where the manifest says so."""
    host: str | None = None

    def __str__(self) -> str:
        whose = f"rank {self.rank}'s file " if self.rank is not None else ""
        return f"{self.what} {whose}{self.file}" + (f" (host {self.host})" if self.host else "")


def examine(checkpoint: Path, part: int = 0, parts: int = 1, digests: bool = True, only: Sequence[str] | None = None,
            manifest: dict[str, Any] | None = None, kind: str = "") -> list[Finding]:  # fmt: skip
    """What is wrong with a checkpoint's files, as this host sees them; of `parts` readers, this is number `part`.

    `only`: of these files alone; `kind`: of the WEIGHTS or the OPTIMIZER alone; `manifest`: where it was read already.
    Without `digests` nothing is read: what is missing or cut off is found, what was changed is not. Raises
    OlderFormatError, as such a checkpoint is no reason to take its steps again; and StorageError when a file cannot be
    read, which says nothing about what is in it.
    """
    try:
        files = (manifest or read_manifest(checkpoint))["files"]
    except OlderFormatError:
        raise
    except CheckpointError as error:
        return [Finding(MANIFEST, f"{str(error).removeprefix(f'{checkpoint}: {MANIFEST} is ')}:")]
    names = [name for name in sorted(files) if (only is None or name in only) and name.startswith(kind)]
    return list(_wrong(checkpoint, {name: files[name] for name in names[part::parts]}, digests))


def _wrong(checkpoint: Path, files: dict[str, Any], digests: bool) -> Iterator[Finding]:
    for name, record in files.items():
        try:
            what = _compare(checkpoint / name, record, digests)
        except OSError as error:
            raise StorageError.of(error, checkpoint / name) from None
        if what:
            yield Finding(name, what, record.get("rank"), record.get("host"))


def _compare(path: Path, record: dict[str, Any], digests: bool) -> str | None:
    """How a file differs from what the manifest says of it."""
    try:
        with path.open("rb") as file:
            if (there := os.fstat(file.fileno()).st_size) != record["bytes"]:
                return f"size mismatch ({there} bytes instead of {record['bytes']}) in"
            if digests and hashlib.file_digest(file, "sha256").hexdigest() != record["sha256"]:
                return "checksum mismatch in"
    except FileNotFoundError:
        return MISSING
    return None


def damage(checkpoint: Path, digests: bool = True, kind: str = "") -> list[str]:
    """What `examine` finds, in words; empty when nothing is wrong."""
    return [str(finding) for finding in examine(checkpoint, digests=digests, kind=kind)]


def newest_valid(run_dir: Path, kind: str = "") -> Path:
    """The newest checkpoint whose files are all as they were written; raises CheckpointError when there is none.

    `kind`: only files of the WEIGHTS are read, or of the OPTIMIZER: two thirds of a checkpoint are Adam's moments,
    which nothing but training needs.
    """
    bad = []
    for checkpoint in committed(run_dir):
        if not (found := damage(checkpoint, kind=kind)):
            return checkpoint
        bad.append(f"  checkpoint {step_of(checkpoint)}: {found[0]}")
    raise CheckpointError("\n".join([f"{run_dir}: no valid checkpoint", *bad]))


def open_shards(checkpoint: Path, kind: str, own: int | None = None, manifest: dict[str, Any] | None = None) -> Shards:
    """All ranks' shards of a kind (WEIGHTS, OPTIMIZER or AVERAGED); raises CheckpointError when there are none.

    `own`: the rank whose shard has all that will be asked for, where the layout is the same; `manifest`: the
    checkpoint's, where it is known. Checkpoints that older versions wrote have no index in it, and are looked up in the
    headers of their files.
    """
    manifest = manifest or read_manifest(checkpoint)
    files = {name: record for name, record in manifest["files"].items() if name.startswith(f"{kind}-")}
    if not files and kind == AVERAGED:
        raise CheckpointError(f"{checkpoint}: has no averaged weights: train.average was not set when it was written")
    if not files:
        raise CheckpointError(f"{checkpoint}: holds only weights, no {kind} files")
    if INDEX not in manifest:
        likely = None if own is None else checkpoint / shard_file(kind, own)
        return Shards(Headers((checkpoint / name for name in sorted(files)), likely))
    index = Index.of(manifest[INDEX])
    tensors = {stored_name(parameter, tensor): (parameter, number) for number, tensor in enumerate(TENSORS[kind])
               for parameter, division in index.divisions.items() if number < division.moments}  # fmt: skip
    starts = {record["rank"]: (checkpoint / name, record["start"]) for name, record in files.items()}
    return Shards(Indexed(index, tensors, starts))


def load_weights(checkpoint: Path, kind: str = WEIGHTS) -> dict[str, Tensor]:
    """Full single-precision weights by parameter name, whatever the layout they were trained under; `kind`: WEIGHTS or
    AVERAGED."""
    weights = open_shards(checkpoint, kind)
    return weights.all_of(weights.shapes)
