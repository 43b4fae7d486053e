"""JSON Lines, plain or compressed with gzip or zstd: a document a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from bst_base.errors import UserError
from data_pipeline.sources.archive import open_stream
from data_pipeline.sources.base import Document, Part, Skipped, Source, existing_directory

_SUFFIXES = tuple(f".{name}{packed}" for name in ("jsonl", "json", "ndjson") for packed in ("", ".gz", ".zst"))


class JsonLines(Source):
    """Every `.jsonl` (also `.json`, `.ndjson`; also with `.gz`, `.zst`) file under a directory, sorted by path."""

    kind: Literal["jsonl"] = "jsonl"
    """JSON Lines, also .gz and .zst."""
    path: Path
    """The directory of the files."""
    text_field: str = "text"
    """Which field of a line's object holds the text."""
    licence_field: str = ""
    """Which field holds the licence, if any does."""
    group_field: str = ""
    """Which field names what must not be split between train and validation (a work, a repository), if any does."""

    def parts(self) -> list[Part]:
        root = existing_directory(self.path, "a directory of JSON Lines files")
        files = [file for file in root.rglob("*") if file.name.endswith(_SUFFIXES) and file.is_file()]
        if not files:
            raise UserError(f"{root}: no {', '.join(_SUFFIXES[:3])} file there")
        return sorted(Part(file.relative_to(root).as_posix(), file.stat().st_size) for file in files)

    def read(self, part: str) -> Iterator[Document | Skipped]:
        path = self.path.expanduser() / part
        with open_stream(path) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield self._document(line, f"{part}:{number}")

    def _document(self, line: bytes, where: str) -> Document:
        try:
            record = json.loads(line)
            text = record[self.text_field]
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: not UTF-8 (byte {error.start} of the line)") from None
        except ValueError as error:
            raise UserError(f"{where}: not JSON: {error}") from None
        except (KeyError, TypeError):
            raise UserError(f"{where}: no field {self.text_field!r}; set source.text_field") from None
        if not isinstance(text, str):
            raise UserError(f"{where}: field {self.text_field!r} is a {type(text).__name__}, not text")
        group = str(record.get(self.group_field, "")) if self.group_field else ""
        licence = str(record.get(self.licence_field) or "unknown") if self.licence_field else "unknown"
        return Document(where, text, licence=licence, group=group)
