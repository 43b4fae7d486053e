"""An existing WebDataset: the text members of its tars, a document a member."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from bst_base.errors import UserError
from data_pipeline.sources.archive import TAR_SUFFIXES, open_stream, tar_members
from data_pipeline.sources.base import Document, Part, Skipped, Source, existing_directory


class WebDatasetTars(Source):
    """Every tar (also .tar.gz, .tgz, .tar.xz, .tar.zst) under a directory, sorted by path."""

    kind: Literal["webdataset"] = "webdataset"
    """An existing WebDataset of text."""
    path: Path
    """The directory of the tars."""
    member: str = "txt"
    """Which member of a sample holds the text: its name from the first dot on."""
    text_field: str = "text"
    """Which field holds the text when the member is JSON."""
    licence: str = "unknown"
    """Licence recorded for every document."""

    def parts(self) -> list[Part]:
        root = existing_directory(self.path, "a directory of WebDataset tars")
        files = [file for file in root.rglob("*") if file.name.endswith(TAR_SUFFIXES) and file.is_file()]
        if not files:
            raise UserError(f"{root}: no tar there")
        return sorted(Part(file.relative_to(root).as_posix(), file.stat().st_size) for file in files)

    def read(self, part: str) -> Iterator[Document | Skipped]:
        with open_stream(self.path.expanduser() / part) as file:
            for member in tar_members(file, part):
                if isinstance(member, Skipped):
                    yield member
                elif member.name.rpartition("/")[2].partition(".")[2] == self.member:
                    where = f"{part}/{member.name}"
                    yield Document(where, self._text(member.data, where), licence=self.licence)

    def _text(self, data: bytes, where: str) -> str | bytes:
        if self.member.rpartition(".")[2] != "json":
            return data
        try:
            text = json.loads(data)[self.text_field]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{where}: no text in field {self.text_field!r}: {error}") from None
        if not isinstance(text, str):
            raise UserError(f"{where}: field {self.text_field!r} is a {type(text).__name__}, not text")
        return text
