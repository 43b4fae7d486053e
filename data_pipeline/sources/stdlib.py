"""Python's own standard library: real code on every machine, a document a module or package."""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from bst_base.errors import UserError
from data_pipeline.sources.base import Document, Part, Skipped, Source, existing_directory, join_files

_LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", "lib-dynload"}


class StandardLibrary(Source):
    """The `.py` files of the running interpreter's standard library.

    A document is a top-level module or a whole package, its files joined with their paths. The package `test` holds
    half of the library: there every module and package is a document of its own.
    """

    kind: Literal["stdlib"] = "stdlib"
    """Python's standard library."""
    path: Path = Field(default_factory=lambda: Path(sysconfig.get_path("stdlib")))
    """The library's directory; by default the running interpreter's (in a virtual environment: its base's)."""

    def parts(self) -> list[Part]:
        root = existing_directory(self.path, "a Python standard library")
        found = [*_modules(root), *_modules(root / "test")]
        parts = [Part(path.relative_to(root).as_posix(), sum(f.stat().st_size for f in _files(path))) for path in found]
        if not parts:
            raise UserError(f"{root}: no Python modules there; source.path must be a Python standard library")
        return sorted(parts)

    def read(self, part: str) -> Iterator[Document | Skipped]:
        root = self.path
        texts = []
        for file in _files(root / part):
            name = file.relative_to(root).as_posix()
            try:
                texts.append((name, file.read_bytes().decode("utf-8")))
            except UnicodeDecodeError as error:  # test data in other encodings
                yield Skipped(name, f"not UTF-8 (byte {error.start})")
        text = texts[0][1] if part.endswith(".py") and texts else join_files(texts)
        yield Document(part, text, licence="PSF-2.0")

    def provenance(self) -> dict[str, Any]:
        return {"python": ".".join(map(str, sys.version_info[:3]))}


def _modules(directory: Path) -> Iterator[Path]:
    """The modules and packages directly in a directory."""
    if not directory.is_dir():
        return
    for path in directory.iterdir():
        if path.name == "test" or path.name in _LEFT_OUT or path.is_symlink():
            continue
        if path.suffix == ".py" or (path.is_dir() and any(_files(path))):
            yield path


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    return sorted(
        f for f in path.rglob("*.py") if f.is_file() and not _LEFT_OUT.intersection(f.parts[len(path.parts) :])
    )
