"""PG-19: Project Gutenberg books published before 1919, in the layout of its release (arXiv 1911.05507)."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Literal

from bst_base.errors import UserError
from data_pipeline.sources.base import Document, Part, Skipped, Source, existing_directory

_SPLITS = ("train", "validation", "test")


class Pg19(Source):
    """A book a file, `<split>/<id>.txt`, with `metadata.csv` (id, title, year, address); its own splits are kept."""

    kind: Literal["pg19"] = "pg19"
    """PG-19 as released: train/, validation/, test/ and metadata.csv."""
    path: Path
    """The directory of the release."""

    def parts(self) -> list[Part]:
        root = existing_directory(self.path, "the directory that holds train/, validation/ and test/")
        parts = [
            Part(file.relative_to(root).as_posix(), file.stat().st_size)
            for split in _SPLITS
            for file in sorted((root / split).glob("*.txt"))
        ]
        if not parts:
            raise UserError(f"{root}: no book there; expected train/*.txt, validation/*.txt and test/*.txt")
        return parts

    def read(self, part: str) -> Iterator[Document | Skipped]:
        root = self.path.expanduser()
        split, _, name = part.partition("/")
        title = _titles(root / "metadata.csv").get(name.removesuffix(".txt"), "")
        yield Document(part, (root / part).read_bytes(), licence="public domain (US)", split=split, title=title)


@lru_cache(maxsize=1)
def _titles(path: Path) -> dict[str, str]:
    """Title and year by book id."""
    if not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        return {row[0]: f"{row[1]} ({row[2]})" for row in csv.reader(file) if len(row) >= 3}
