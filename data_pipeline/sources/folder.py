"""A folder of text files, a document a file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from bst_base.errors import UserError
from data_pipeline.sources.base import Document, Part, Skipped, Source, existing_directory


class Folder(Source):
    """Every file under a folder whose name matches, sorted by path; links to directories are not followed."""

    kind: Literal["folder"] = "folder"
    """A folder of text files."""
    path: Path
    """The folder."""
    pattern: str = "**/*.txt"
    """Which files, as a glob relative to the folder."""
    licence: str = "unknown"
    """Licence recorded for every document."""

    def parts(self) -> list[Part]:
        root = existing_directory(self.path, "the folder of text files")
        files = [file for file in root.glob(self.pattern) if file.is_file()]
        if not files:
            raise UserError(f"{root}: no file matches {self.pattern!r}; set source.pattern or source.path")
        return sorted(Part(file.relative_to(root).as_posix(), file.stat().st_size) for file in files)

    def read(self, part: str) -> Iterator[Document | Skipped]:
        yield Document(part, (self.path.expanduser() / part).read_bytes(), licence=self.licence)
