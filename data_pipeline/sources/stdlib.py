"""Python's standard library: real code that is on every machine, one document per module or package."""

from __future__ import annotations

import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from bst_base.errors import UserError
from data_pipeline.sources.base import (
    Document,
    Listing,
    LocalPath,
    Part,
    Skipped,
    Source,
    existing_directory,
    join_files,
)
from data_pipeline.sources.tree import walk

_LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", "lib-dynload"}


class StandardLibrary(Source):
    """The `.py` files of the running interpreter's standard library.

    A document is a top-level module or a whole package: its files joined, each with its path. The package `test` is
    half of the library, so each module or package in it is its own document.
    """

    kind: Literal["stdlib"] = "stdlib"
    """Python's standard library."""
    path: LocalPath = Field(default_factory=lambda: Path(sysconfig.get_path("stdlib")))
    """Directory of the library; by default the running interpreter's (in a virtual environment, its base's)."""

    @property
    def root(self) -> Path:
        """The directory of the library."""
        return existing_directory(self.path, "a Python standard library")

    def directory(self) -> Path:
        """See `Source`."""
        return self.path.expanduser()

    def listing(self) -> Listing:
        root = self.root
        sizes: Counter[str] = Counter()
        skipped = []
        for found in _modules(root):
            if isinstance(found, Skipped):
                skipped.append(found)
            else:
                sizes[_module_of(found[0])] += found[1].stat().st_size
        if not sizes:
            raise UserError(f"{root}: no Python modules there; source.path must be a Python standard library")
        return Listing(sorted(Part(name, size) for name, size in sizes.items()), skipped)

    def files(self, part: Part) -> list[Path]:
        path = self.root / part.name
        return [path] if path.is_file() else [file for _, file in _python_files(path)]

    def names_from(self, part: Part) -> Path | None:
        path = self.root / part.name
        return path if path.is_dir() else None

    def read(self, part: Part) -> Iterator[Document | Skipped]:
        texts, root = [], self.root
        for file in self.files(part):
            name = file.relative_to(root).as_posix()
            try:
                texts.append((name, file.read_bytes().decode("utf-8")))
            except UnicodeDecodeError as error:  # test data in other encodings
                yield Skipped(name, f"not UTF-8 (byte {error.start})")
        text = texts[0][1] if part.name.endswith(".py") and texts else join_files(texts)
        yield Document(part.name, text, licence="PSF-2.0")

    def provenance(self) -> dict[str, Any]:
        return {"python": ".".join(map(str, sys.version_info[:3]))}


def _modules(root: Path) -> Iterator[tuple[str, Path] | Skipped]:
    """Yield the file of every module below a directory. Of other entries, only unreadable ones are reported."""
    for found in walk(root, enter=lambda name: not _LEFT_OUT.intersection(name.split("/"))):
        if isinstance(found, Skipped):
            if found.bad:
                yield found
        elif found[0].endswith(".py") and not found[1].is_symlink():
            yield found


def _module_of(name: str) -> str:
    """Return the top-level module or package of a file; inside `test`, the one below it."""
    parts = name.split("/")
    return "/".join(parts[: 2 if parts[0] == "test" else 1])


def _python_files(path: Path) -> list[tuple[str, Path]]:
    return sorted(found for found in _modules(path) if not isinstance(found, Skipped))
