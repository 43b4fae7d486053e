"""A folder of text files, one document per file."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Literal

from data_pipeline.sources.archive import open_stream
from data_pipeline.sources.base import Document, Part, Skipped
from data_pipeline.sources.tree import FileSource, glob_pattern

_pattern = lru_cache(maxsize=4)(glob_pattern)


class Folder(FileSource):
    """Every file under a folder whose name matches, sorted by path; `.gz`, `.xz`, `.zst` are decompressed.

    Links that lead out of the folder, and links to directories, are not followed.
    """

    kind: Literal["folder"] = "folder"
    """A folder of text files."""
    pattern: str = "**/*.txt"
    """Files to take, as a glob relative to the folder."""
    licence: str = "unknown"
    """Licence to record for every document."""

    def wanted(self, name: str) -> bool:
        return _pattern(self.pattern).fullmatch(name) is not None

    @property
    def selection(self) -> str:
        return f"{self.kind} {self.pattern}"

    def expected(self) -> str:
        return f"a folder with files that match source.pattern, {self.pattern!r} (**/ matches any folder below)"

    def read(self, part: Part) -> Iterator[Document | Skipped]:
        with open_stream(self.root / part.name) as file:
            yield Document(part.name, file.read(), licence=self.licence, split=self.split_of(part))
