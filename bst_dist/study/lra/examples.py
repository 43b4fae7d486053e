"""The examples of a task on disk: written once by `bst lra prepare`, read at random in training.

manifest.json      the task, the settings it was made with, and of each split what it holds and the digests of its files
<split>.symbols    the symbols of all sequences, one after the other, a byte each
<split>.ends.npy   (n, sequences of an example) int64: where each sequence ends
<split>.classes.npy  (n,) uint8
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
    """Prepared examples that are missing, damaged, or of another task."""


@dataclass(frozen=True)
class Examples:
    """One split, open for reading."""

    task: Task
    where: str
    symbols: np.ndarray
    ends: np.ndarray
    classes: np.ndarray
    sha256: str
    """Of the manifest, and so of everything prepared with the split."""

    def __len__(self) -> int:
        return len(self.classes)

    def sequences(self, index: int) -> list[np.ndarray]:
        """The sequences of an example, each (n,) uint8."""
        count = self.task.sequences
        begin = int(self.ends[index - 1, -1]) if index else 0
        places = [begin, *self.ends[index].tolist()]
        return [self.symbols[places[number] : places[number + 1]] for number in range(count)]

    @property
    def longest(self) -> int:
        """Symbols of the longest sequence."""
        return int(np.diff(self.ends.reshape(-1), prepend=0).max())


def write(directory: Path, task: Task, settings: dict[str, Any], splits: Mapping[str, Iterable[Example]]) -> dict:
    """Write the examples of every split into a new directory; returns its manifest.

    The directory appears when all is written, or not at all. Raises ExamplesError when it exists.
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
    """The manifest of prepared examples, and its digest; raises ExamplesError when there is none."""
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
    """Open a split of prepared examples; raises ExamplesError when they are of another task, missing or cut off."""
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
        raise ExamplesError(f"{where}: has {len(opened[0])} symbols of {len(opened[2])} examples, the manifest says "
                            f"{described['symbols']} of {described['examples']}: prepare the task again")  # fmt: skip
    return Examples(task, where, *opened, sha256)


def _names(split: str) -> tuple[str, str, str]:
    return f"{split}.symbols", f"{split}.ends.npy", f"{split}.classes.npy"
