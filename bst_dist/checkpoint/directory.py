"""Checkpoints on disk: which exist, which are complete and undamaged, and their contents.

    checkpoints/step-00000100/manifest.json               written last; lists every file with its size and digest
                             /weights-00000.safetensors   single-precision weights, one file per rank
                             /optimizer-00000.safetensors both moments of Adam, or Muon's momentum, one file per rank
                             /averaged-00000.safetensors  averaged weights if train.average is set, one file per rank
                             /rank-00000.pt               state of one rank: random generators, the carried past
                             /pinned                      exists if the checkpoint must never be removed

A checkpoint is written to a directory whose name ends in ``.partial``, and renamed when it is complete. So a directory
without that suffix was complete once; the digests show whether it still is. When it replaces an older checkpoint of the
same step, the older one is first renamed to ``step-00000100.replaced``. If the process is killed before the newer one
has its name, the older one still counts under that name. A weights-only checkpoint has no optimizer files: it can be
evaluated and exported, but no run can resume from it.

`saving` writes checkpoints, `snapshot` resumes from them, and `retention` decides which are kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from bst_base.errors import StorageError, UserError
from bst_dist.checkpoint.index import Index, Indexed
from bst_dist.checkpoint.shards import Headers, Shards

if TYPE_CHECKING:
    from torch import Tensor

CHECKPOINTS, MANIFEST, PINNED = "checkpoints", "manifest.json", "pinned"
WEIGHTS, OPTIMIZER, AVERAGED = "weights", "optimizer", "averaged"
WEIGHT, MOMENTS, AVERAGE = "weight", ("exp_avg", "exp_avg_sq"), "average"
TENSORS = {WEIGHTS: (WEIGHT,), OPTIMIZER: MOMENTS, AVERAGED: (AVERAGE,)}
"""Tensors of every parameter in the files of each kind, in this order; Muon's matrices have only the first moment."""
PARTIAL, REPLACED, DELETED, DAMAGED = ".partial", ".replaced", ".deleted", ".damaged"
INDEX = "index"
FORMAT = 2
_DIGEST = "sha256"
"""Key of a manifest's own digest. Without it a flipped digit, for example of the step or of the index, is not seen."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, or of another run."""


class ManifestError(CheckpointError):
    """A manifest that is damaged, or that this host does not see."""

    def __init__(self, checkpoint: Path | str, what: str, missing: bool = False) -> None:
        super().__init__(checkpoint, what, missing)  # unchanged, so that the error can be sent to other ranks
        self.checkpoint, self.what, self.missing = checkpoint, what, missing

    def __str__(self) -> str:
        return f"{self.checkpoint}: {MANIFEST} is {self.what}"


class OtherFormatError(CheckpointError):
    """A complete checkpoint in the format of an older or newer version of this program."""


def directory(run_dir: Path, step: int) -> Path:
    """Return the directory of the checkpoint taken after `step` steps."""
    return run_dir / CHECKPOINTS / f"step-{step:08d}"


def shard_file(kind: str, rank: int) -> str:
    """Return the file name of a rank's shard; `kind`: WEIGHTS, OPTIMIZER or AVERAGED."""
    return f"{kind}-{rank:05d}.safetensors"


def stored_name(parameter: str, tensor: str) -> str:
    """Return the name of a parameter's tensor in a shard: its own name for a weight or average, else with a prefix."""
    return parameter if tensor in (WEIGHT, AVERAGE) else f"{tensor}/{parameter}"


def rank_file(rank: int) -> str:
    """Return the file name of the state that only one rank has."""
    return f"rank-{rank:05d}.pt"


def committed(run_dir: Path) -> list[Path]:
    """Return the checkpoints that were committed, newest first, without checking them for damage.

    There is one per step: a REPLACED one is left out unless nothing has taken its place. Raises StorageError when this
    host cannot read the directory.
    """
    names = {name for name in entries(run_dir) if re.fullmatch(rf"step-\d{{8,}}({re.escape(REPLACED)})?", name)}
    counting = (name for name in names if not (name.endswith(REPLACED) and name.removesuffix(REPLACED) in names))
    return sorted((run_dir / CHECKPOINTS / name for name in counting), key=step_of, reverse=True)


def find(run_dir: Path, step: int) -> Path | None:
    """Return the committed checkpoint of a step; None if there is none."""
    return next((path for path in committed(run_dir) if step_of(path) == step), None)


def require_step(run_dir: Path, step: int) -> Path:
    """Return the committed checkpoint of a step; raises CheckpointError, which lists the others, if there is none."""
    if (path := find(run_dir, step)) is None:
        there = ", ".join(str(step_of(found)) for found in committed(run_dir)) or "none"
        raise CheckpointError(f"{run_dir}: no checkpoint of step {step}; there are: {there}")
    return path


def entries(run_dir: Path) -> list[str]:
    """Return all names in the checkpoints directory of a run; raises StorageError when this host cannot read it."""
    try:
        return [path.name for path in (run_dir / CHECKPOINTS).iterdir()]  # glob would return [] without permission
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StorageError.of(error, run_dir / CHECKPOINTS) from None


def step_of(path: Path) -> int:
    """Return the step of a checkpoint: the number of steps taken before it."""
    return int(path.name.removeprefix("step-").removesuffix(REPLACED))


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Read the manifest of a checkpoint.

    Raises ManifestError when it is missing or damaged, OtherFormatError when another version of this program wrote it,
    and StorageError when this host cannot read the file.
    """
    try:
        content = (checkpoint / MANIFEST).read_bytes()
    except FileNotFoundError:
        raise ManifestError(checkpoint, "missing", missing=True) from None
    except OSError as error:
        raise StorageError.of(error, checkpoint / MANIFEST) from None
    return parse_manifest(content, checkpoint)


def parse_manifest(content: bytes, checkpoint: Path | str) -> dict[str, Any]:
    """Return the manifest in a file's content, compared with its digest if it has one (older manifests do not).

    `checkpoint`: where it was read, for errors. Raises ManifestError and OtherFormatError as `read_manifest` does.
    """
    try:
        manifest = json.loads(content)
    except ValueError as error:
        raise ManifestError(checkpoint, f"not JSON: {error}") from None
    written = manifest.get("format") if isinstance(manifest, dict) else None
    if not isinstance(written, int):
        raise ManifestError(checkpoint, "not that of a checkpoint of this program")
    if written != FORMAT:
        raise OtherFormatError(
            f"{checkpoint}: written by another version of this program, in format {written}; this one reads format "
            f"{FORMAT}: continue with the version that wrote it, or start a new run in another --run-dir"
        )
    if manifest.pop(_DIGEST, None) not in (None, _digest(manifest)):
        raise ManifestError(checkpoint, "damaged (checksum mismatch)")
    return manifest


def manifest_content(manifest: dict[str, Any]) -> bytes:
    """Return the content of a manifest's file: JSON that ends with a digest of the rest."""
    return json.dumps({**manifest, _DIGEST: _digest(manifest)}, indent=1).encode()


def _digest(manifest: dict[str, Any]) -> str:
    """Return the SHA-256 of a manifest's values in their order, whatever the white space in its file."""
    return hashlib.sha256(json.dumps(manifest).encode()).hexdigest()


def is_full(manifest: dict[str, Any]) -> bool:
    """Whether a run can resume from the checkpoint: it has optimizer states too."""
    return has(manifest, OPTIMIZER)


def has(manifest: dict[str, Any], kind: str) -> bool:
    """Whether a checkpoint has files of a kind: WEIGHTS, OPTIMIZER or AVERAGED."""
    return any(name.startswith(f"{kind}-") for name in manifest["files"])


def size(manifest: dict[str, Any]) -> int:
    """Return the total size of a checkpoint's files in bytes."""
    return sum(record["bytes"] for record in manifest["files"].values())


@dataclass(frozen=True)
class Finding:
    """A problem with one file of a checkpoint."""

    file: str
    what: str
    """The problem, as it is printed before the file's name: `checksum mismatch in`."""
    rank: int | None = None
    """The rank that wrote the file, and its host, if the manifest records them."""
    host: str | None = None
    missing: bool = False
    """Whether this host does not see the file. Another one may, so it is no reason to remove the checkpoint."""

    def __str__(self) -> str:
        whose = f"rank {self.rank}'s file " if self.rank is not None else ""
        return f"{self.what} {whose}{self.file}" + (f" (host {self.host})" if self.host else "")


def examine(checkpoint: Path, digests: bool = True, kind: str = "") -> list[Finding]:
    """Check a checkpoint's files against its manifest, as this host sees them, and return the problems.

    `digests`, and errors: as in `compare`. `kind`: check only files of this kind. Raises OtherFormatError too, because
    such a checkpoint is not damaged.
    """
    files, found = listed_files(checkpoint)
    return found or compare(checkpoint, {name: files[name] for name in files if name.startswith(kind)}, digests)


def listed_files(
    checkpoint: Path, manifest: dict[str, Any] | None = None
) -> tuple[dict[str, dict[str, Any]], list[Finding]]:
    """Return the records of the files in a checkpoint's manifest, sorted by name, and the manifest's own problem.

    `manifest`: the manifest if it was already read. Without a valid one there are no files and one problem.
    """
    try:
        return dict(sorted((manifest or read_manifest(checkpoint))["files"].items())), []
    except ManifestError as error:
        return {}, [Finding(MANIFEST, f"{error.what}:", missing=error.missing)]


def compare(
    checkpoint: Path,
    files: Mapping[str, dict[str, Any]],
    digests: bool = True,
    arrived: Callable[[], None] = lambda: None,
) -> list[Finding]:
    """Compare files of a checkpoint with their records, by name; return the problems.

    Without `digests` only existence and size are compared, and no content is read. `arrived`: called after each part
    that is read. Raises StorageError when a file cannot be read, because its content may be intact.
    """
    return list(_wrong(checkpoint, files, digests, arrived))


def _wrong(checkpoint: Path, files: Mapping[str, Any], digests: bool, arrived: Callable[[], None]) -> Iterator[Finding]:
    for name, record in files.items():
        rank, host = record.get("rank"), record.get("host")
        try:
            if what := _compare(checkpoint / name, record, digests, arrived):
                yield Finding(name, what, rank, host)
        except FileNotFoundError:
            yield Finding(name, "missing:", rank, host, missing=True)
        except OSError as error:
            raise StorageError.of(error, checkpoint / name) from None


def _compare(path: Path, record: dict[str, Any], digests: bool, arrived: Callable[[], None]) -> str | None:
    """Return how a file differs from its record in the manifest; None if it does not."""
    with path.open("rb") as file:
        if (there := os.fstat(file.fileno()).st_size) != record["bytes"]:
            return f"size mismatch ({there} bytes instead of {record['bytes']}) in"
        if digests and hashlib.file_digest(_ProgressFile(file, arrived), "sha256").hexdigest() != record["sha256"]:
            return "checksum mismatch in"
    return None


class _ProgressFile:
    """A file for `hashlib.file_digest` that calls `arrived` after each part that was read."""

    def __init__(self, file: IO[bytes], arrived: Callable[[], None]) -> None:
        self.readable, self._file, self._arrived = file.readable, file, arrived

    def readinto(self, buffer: bytearray) -> int:
        count = self._file.readinto(buffer)
        self._arrived()
        return count


def damage(checkpoint: Path, digests: bool = True, kind: str = "") -> list[str]:
    """Return the problems that `examine` finds as text; empty when there are none."""
    return [str(finding) for finding in examine(checkpoint, digests=digests, kind=kind)]


def require_intact(checkpoint: Path, kind: str = "", found: Sequence[object] | None = None) -> None:
    """Raise CheckpointError, which names the first problem, unless a checkpoint's files match their manifest.

    `kind`: check only files of this kind. `found`: the problems, if the files were already checked.
    """
    if found := damage(checkpoint, kind=kind) if found is None else found:
        raise CheckpointError(
            f"{checkpoint}: {found[0]}: choose another step, or restore the file (`bst ckpt verify "
            f"{checkpoint.parent.parent}` names every damaged one)"
        )


def newest_valid(run_dir: Path, kind: str = "") -> Path:
    """Return the newest checkpoint whose files match their manifest; raises CheckpointError when there is none.

    `kind`: check only files of this kind, for example WEIGHTS: two thirds of a checkpoint are Adam's moments, which
    only training needs.
    """
    bad = []
    for checkpoint in committed(run_dir):
        if not (found := damage(checkpoint, kind=kind)):
            return checkpoint
        bad.append(f"  checkpoint {step_of(checkpoint)}: {found[0]}")
    raise CheckpointError("\n".join([f"{run_dir}: no valid checkpoint", *bad]))


def open_shards(checkpoint: Path, kind: str, own: int | None = None, manifest: dict[str, Any] | None = None) -> Shards:
    """Open the shards of all ranks of a kind (WEIGHTS, OPTIMIZER or AVERAGED).

    Raises CheckpointError when there are none. `own`: the rank whose shard should have all requested elements, if the
    layout is unchanged. `manifest`: the manifest if it was already read. Manifests of older versions have no index; the
    headers of the files are read instead.
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
    tensors = {
        stored_name(parameter, tensor): (parameter, number)
        for number, tensor in enumerate(TENSORS[kind])
        for parameter, division in index.divisions.items()
        if number < division.moments
    }
    starts = {record["rank"]: (checkpoint / name, record["start"]) for name, record in files.items()}
    return Shards(Indexed(index, tensors, starts))


def load_weights(checkpoint: Path, kind: str = WEIGHTS) -> dict[str, Tensor]:
    """Return the full single-precision weights by parameter name, for any training layout.

    `kind`: WEIGHTS or AVERAGED.
    """
    weights = open_shards(checkpoint, kind)
    return weights.all_of(weights.shapes)
