"""The examples of a task on disk: written once by `bst lra prepare`, read in random order by training.

manifest.json        the task, its settings, and for each split the counts and the digests of its files
<split>.symbols      the symbols of all sequences, concatenated, one byte each
<split>.ends.npy     (n, sequences per example) int64: the end of each sequence in the symbols
<split>.classes.npy  (n,) uint8: the class of each example
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bst_base.errors import UserError
from bst_base.files import atomic_directory
from bst_dist.study.lra.files import Example
from bst_dist.study.lra.tasks import Task
from data_pipeline.format.manifest import MANIFEST, sha256_file

FORMAT = "long-range-arena-1"


class ExamplesError(UserError):
    """The prepared examples are missing, damaged, or of another task; or the directory to write exists."""


@dataclass(frozen=True)
class Examples:
    """One split of a task, open for reading."""

    task: Task
    where: str
    symbols: np.ndarray
    ends: np.ndarray
    classes: np.ndarray
    sha256: str
    """Digest of the manifest. It identifies all splits, because the manifest contains the digests of their files."""

    def __len__(self) -> int:
        return len(self.classes)

    def sequences(self, index: int) -> list[np.ndarray]:
        """Return the sequences of an example, each (n,) uint8."""
        count = self.task.sequences
        begin = int(self.ends[index - 1, -1]) if index else 0
        places = [begin, *self.ends[index].tolist()]
        return [self.symbols[places[number] : places[number + 1]] for number in range(count)]

    @property
    def longest(self) -> int:
        """Number of symbols of the longest sequence."""
        return int(np.diff(self.ends.reshape(-1), prepend=0).max())


def write(directory: Path, task: Task, settings: dict[str, Any], splits: Mapping[str, Iterable[Example]]) -> dict:
    """Write the examples of every split into a new directory and return its manifest.

    The write is atomic: the directory appears when everything is written. Raises ExamplesError if it exists.
    """
    if directory.exists():
        raise ExamplesError(f"{directory}: exists already; remove it, or choose another with --to")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with atomic_directory(directory) as partial:
        described = {split: _write_split(partial, split, task, examples) for split, examples in splits.items()}
        manifest = {"format": FORMAT, "task": task.name, "settings": settings, "splits": described}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    return manifest


def _write_split(directory: Path, split: str, task: Task, examples: Iterable[Example]) -> dict[str, Any]:
    names = _names(split)
    ends, classes, end, longest = [], [], 0, 0
    with (directory / names[0]).open("wb") as file:
        for sequences, label in examples:
            for sequence in sequences:
                file.write(sequence.tobytes())
                end, longest = end + len(sequence), max(longest, len(sequence))
                ends.append(end)
            classes.append(label)
    np.save(directory / names[1], np.array(ends, np.int64).reshape(-1, task.sequences))
    np.save(directory / names[2], np.array(classes, np.uint8))
    return {
        "examples": len(classes),
        "symbols": end,
        "longest": longest,
        "class_counts": np.bincount(np.array(classes, np.int64), minlength=task.classes).tolist(),
        "files": {name: sha256_file(directory / name) for name in names},
    }


def read_manifest(directory: Path) -> tuple[dict[str, Any], str]:
    """Read the manifest of prepared examples; return it and its digest. Raises ExamplesError if there is none."""
    path = directory / MANIFEST
    try:
        content = path.read_bytes()
        manifest = json.loads(content)
    except (OSError, ValueError) as error:
        raise ExamplesError(f"{path}: no prepared examples ({error}); make them with 'bst lra prepare'") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ExamplesError(f"{path}: not the manifest of a Long Range Arena task (format {FORMAT})")
    return manifest, hashlib.sha256(content).hexdigest()


def open_split(directory: Path, split: str, task: Task) -> Examples:
    """Open a split of prepared examples; raises ExamplesError if they are of another task, missing or truncated."""
    manifest, sha256 = read_manifest(directory)
    if manifest["task"] != task.name:
        raise ExamplesError(f"{directory}: examples of {manifest['task']}, not of {task.name}")
    where, described = f"{directory} ({split})", manifest["splits"][split]
    symbols, ends, classes = (directory / name for name in _names(split))
    try:
        opened = (np.memmap(symbols, np.uint8, "r"), np.load(ends, mmap_mode="r"), np.load(classes))
    except (OSError, ValueError) as error:
        raise ExamplesError(f"{where}: cannot be read: {error}; prepare the task again") from None
    if (len(opened[0]), len(opened[2])) != (described["symbols"], described["examples"]):
        raise ExamplesError(
            f"{where}: has {len(opened[0])} symbols of {len(opened[2])} examples, the manifest says "
            f"{described['symbols']} of {described['examples']}: prepare the task again"
        )
    return Examples(task, where, *opened, sha256)


def _names(split: str) -> tuple[str, str, str]:
    return f"{split}.symbols", f"{split}.ends.npy", f"{split}.classes.npy"
