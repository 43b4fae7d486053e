"""Decides which checkpoints of a run are kept, and removes the others.

Only full checkpoints count for `keep_last` and `keep_best`. A checkpoint with an invalid manifest does not count and is
left alone. A checkpoint is renamed before it is removed, so a partly removed one never has a checkpoint's name.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any

from bst_base.errors import StorageError, UserError
from bst_base.files import atomic_file, sync_directory
from bst_dist.checkpoint.config import CheckpointConfig
from bst_dist.checkpoint.directory import (
    CHECKPOINTS,
    DAMAGED,
    DELETED,
    MANIFEST,
    PARTIAL,
    PINNED,
    REPLACED,
    WEIGHTS,
    CheckpointError,
    committed,
    entries,
    is_full,
    manifest_content,
    read_manifest,
    step_of,
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckpointEntry:
    """One checkpoint of a run, as its manifest describes it."""

    path: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        """Number of steps taken before it."""
        return step_of(self.path)

    @property
    def full(self) -> bool:
        """Whether a run can resume from it."""
        return is_full(self.manifest)

    @property
    def validation_loss(self) -> float | None:
        """Validation loss in nats per token; None if it was not evaluated at its step."""
        return self.manifest.get("validation_loss_nats")

    @property
    def pinned(self) -> bool:
        """Whether a user has pinned it, so that it is never removed."""
        return (self.path / PINNED).exists()


def readable(run_dir: Path) -> list[CheckpointEntry]:
    """Return the checkpoints of a run with a valid manifest, newest first; raises StorageError if a read fails."""
    found = []
    for path in committed(run_dir):
        try:
            found.append(CheckpointEntry(path, read_manifest(path)))
        except CheckpointError:
            continue
    return found


def files_held(run_dir: Path) -> int:
    """Return the number of files below the checkpoints directory; it falls while checkpoints are removed."""
    return sum(len(names) for *_, names in os.walk(run_dir / CHECKPOINTS))


def has_full(run_dir: Path) -> bool:
    """Whether a run has a checkpoint that it can resume from, according to the manifests."""
    return any(one.full for one in readable(run_dir))


def reasons(
    held: Sequence[CheckpointEntry], config: CheckpointConfig, constant_until: int | None = None
) -> dict[int, list[str]]:
    """Return step -> the reasons to keep that checkpoint; one without a reason may be removed.

    If the only reason is "weights", all but the weights may be removed. `held`: valid checkpoints, newest first.
    `constant_until`: the step at which the learning rate begins to decay, if it does.
    """
    full = [one.step for one in held if one.full]
    newest = full[: config.keep_last]
    # The guard rolls back to the newest scheduled checkpoint. This must not depend on where the run was stopped.
    newest += [step for step in full if config.scheduled(step)][:1]
    # Once the decay has begun, keep the last checkpoint before it: a longer run can branch off from there, but not from
    # later steps, which had other learning rates.
    decays = constant_until is not None and bool(full) and full[0] > constant_until
    constant = [step for step in full if decays and step <= constant_until][:1]
    evaluated = [one for one in held if one.full and one.validation_loss is not None]
    # NaN is neither larger nor smaller than other losses, so its place in the order would be chance.
    finite = [one for one in evaluated if math.isfinite(one.validation_loss)]
    best = [one.step for one in sorted(finite, key=lambda one: one.validation_loss)[: config.keep_best]]
    return {
        one.step: [
            *(["newest"] if one.step in newest else []),
            *(["best"] if one.step in best else []),
            *(["before decay"] if one.step in constant else []),
            *(["pinned"] if one.pinned else []),
            *(["at"] if one.step in config.at else []),
            *(["every"] if config.keep_every and one.step % config.keep_every == 0 else []),
            *(["weights"] if config.weights_every and one.step % config.weights_every == 0 else []),
        ]
        for one in held
    }


def tidy(run_dir: Path, config: CheckpointConfig, constant_until: int | None = None) -> None:
    """Remove the checkpoints of a run that are not kept; a failure is logged, and the next call tries again."""
    try:
        settle_replaced(run_dir)
        retain(run_dir, config, constant_until)
        remove_leftovers(run_dir, (DELETED,))
    except StorageError as error:
        _log.warning("old checkpoints could not be looked at: %s", error)


def retain(run_dir: Path, config: CheckpointConfig, constant_until: int | None = None) -> None:
    """Rename the checkpoints that are not kept; `remove_leftovers` then removes them.

    Called right after the newest checkpoint was committed with its digests, so a valid one always remains. A checkpoint
    for which this fails is logged, and stays.
    """
    held = readable(run_dir)
    kept = reasons(held, config, constant_until)
    for one in held:
        with _logged(one.path):
            if not kept[one.step]:
                delete(one.path)
            elif kept[one.step] == ["weights"]:
                keep_only_weights(one)


def keep_only_weights(held: CheckpointEntry) -> None:
    """Remove everything but the weights from a checkpoint; if killed midway, it is still a valid checkpoint.

    A link is left as it is: the archive it points to is not this run's to thin.
    """
    if held.path.is_symlink():
        return
    kept = {name: record for name, record in held.manifest["files"].items() if name.startswith(f"{WEIGHTS}-")}
    if held.full:
        with atomic_file(held.path / MANIFEST) as file:
            file.write(manifest_content({**held.manifest, "files": kept}))
    for path in held.path.iterdir():
        if path.name not in (*kept, MANIFEST, PINNED):
            path.unlink()


def leftovers(run_dir: Path, suffixes: Sequence[str] = (PARTIAL, DELETED)) -> list[Path]:
    """Return the directories that interrupted writes and removals have left behind."""
    names = (name for name in entries(run_dir) if name.startswith("step-"))
    return sorted(run_dir / CHECKPOINTS / name for name in names if name.endswith(tuple(suffixes)))


def remove_leftovers(run_dir: Path, suffixes: Sequence[str] = (PARTIAL, DELETED)) -> None:
    """Remove these directories; call it only while no checkpoint is being written.

    One that cannot be removed is logged, and the others are removed.
    """
    for path in leftovers(run_dir, suffixes):
        with _logged(path):
            remove(path)


def replace(checkpoint: Path, newer: Path) -> None:
    """Rename the directory `newer` to `checkpoint`; a checkpoint that has this name is REPLACED.

    Both renames are durable when this returns. If only the first one happens, the older checkpoint still counts.
    """
    if os.path.lexists(checkpoint):
        if os.path.lexists(older := _replaced(checkpoint)):  # `settle_replaced` has failed before
            _rename(older, DELETED)
        checkpoint.rename(older)
    newer.rename(checkpoint)
    sync_directory(checkpoint.parent)


def settle_replaced(run_dir: Path) -> None:
    """Delete REPLACED checkpoints, or give them their names back where the newer one never got it.

    Call it only while no checkpoint is being committed. A failure is logged.
    """
    for path in superseded(run_dir):
        with _logged(path):
            _rename(path, DELETED)
    for path in leftovers(run_dir, (REPLACED,)):
        with _logged(path, "renamed"):
            path.rename(_newer(path))
            sync_directory(path.parent)


def superseded(run_dir: Path) -> list[Path]:
    """Return the REPLACED checkpoints that do not count any more: the newer ones have their names."""
    return [path for path in leftovers(run_dir, (REPLACED,)) if os.path.lexists(_newer(path))]


def _newer(replaced: Path) -> Path:
    return replaced.with_name(replaced.name.removesuffix(REPLACED))


def _replaced(checkpoint: Path) -> Path:
    return checkpoint.with_name(f"{checkpoint.name}{REPLACED}")


def remove(leftover: Path) -> None:
    """Remove a directory for good. Of a link only the link: the archive it points to is not this run's to remove."""
    if leftover.is_symlink():
        leftover.unlink()
    else:
        shutil.rmtree(leftover)


@contextmanager
def _logged(path: Path, done: str = "removed") -> Iterator[None]:
    """Log the error for which a checkpoint could not be `done`, and continue."""
    try:
        yield
    except (OSError, UserError) as error:
        why = getattr(error, "strerror", None) or error
        _log.warning("%s: could not be %s: %s; tried again at the next checkpoint", path, done, why)


def abandon(run_dir: Path, step: int) -> None:
    """Rename the checkpoints after `step` so that they are removed: the run takes those steps again with other data."""
    for path in committed(run_dir):
        if step_of(path) > step:
            if CheckpointEntry(path, {}).pinned:
                _log.warning(
                    "%s: was pinned, and is removed: the run rolls back to step %d and takes the later steps "
                    "again with other data",
                    path,
                    step,
                )
            delete(path)


def set_aside(checkpoint: Path) -> None:
    """Rename a damaged checkpoint, so that it no longer counts; its files are kept."""
    _rename(checkpoint, DAMAGED)


def delete(checkpoint: Path) -> Path:
    """Rename a checkpoint, so that it no longer counts and `remove_leftovers` removes it; return its new path.

    One that it has replaced goes first: it would count again.
    """
    if os.path.lexists(older := _replaced(checkpoint)):
        _rename(older, DELETED)
    return _rename(checkpoint, DELETED)


def _rename(checkpoint: Path, suffix: str) -> Path:
    """Add a suffix to the name, and a number if there is such a name already; return the new path."""
    names = chain([""], (f".{number}" for number in count(2)))
    others = (checkpoint.with_name(f"{checkpoint.name}{name}{suffix}") for name in names)
    return checkpoint.rename(next(other for other in others if not os.path.lexists(other)))
