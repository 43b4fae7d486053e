"""PG-19: Project Gutenberg books published before 1919, in the layout of its release (arXiv 1911.05507)."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Literal

from bst_base.errors import UserError
from data_pipeline.sources.base import Document, Listing, Part, Skipped
from data_pipeline.sources.tree import FileSource, glob_pattern

_SPLITS = ("train", "validation", "test")
_BOOK = glob_pattern("*/*.txt")


class Pg19(FileSource):
    """One document per book, `<split>/<id>.txt`, with `metadata.csv` (id, title, year, address).

    Its own splits are kept.
    """

    kind: Literal["pg19"] = "pg19"
    """PG-19 as released: train/, validation/, test/ and metadata.csv."""
    own_splits: Literal[True] = True
    """Always true: the release has its own splits."""

    def wanted(self, name: str) -> bool:
        return name.partition("/")[0] in _SPLITS and _BOOK.fullmatch(name) is not None

    def copied(self, name: str) -> bool:
        return self.wanted(name) or name == "metadata.csv"

    def expected(self) -> str:
        return "the directory that holds train/*.txt, validation/*.txt and test/*.txt"

    def listing(self) -> Listing:
        parts, skipped = super().listing()
        return Listing(sorted(parts, key=lambda part: (_SPLITS.index(self.split_of(part)), part.name)), skipped)

    def read(self, part: Part) -> Iterator[Document | Skipped]:
        title = _titles(self.root / "metadata.csv").get(Path(part.name).stem, "")
        text = (self.root / part.name).read_bytes()
        yield Document(part.name, text, licence="public domain (US)", split=self.split_of(part), title=title)


@lru_cache(maxsize=1)
def _titles(path: Path) -> dict[str, str]:
    """Return the title and year of each book, by book id."""
    if not path.exists():
        return {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return {row[0]: f"{row[1]} ({row[2]})" for row in csv.reader(file) if len(row) >= 3}
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: damaged ({error}); get the file again, or remove it: it only gives titles") from None
