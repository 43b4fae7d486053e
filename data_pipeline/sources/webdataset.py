"""An existing WebDataset: the text members of its tars, one document per member."""

from __future__ import annotations

import gzip
import json
import lzma
from collections.abc import Iterator
from typing import Literal

from backports import zstd

from data_pipeline.sources.archive import TAR_SUFFIXES, damage_explained, open_stream, tar_members
from data_pipeline.sources.base import Document, Endings, Part, Skipped
from data_pipeline.sources.tree import FileSource

_UNPACK = {".gz": gzip.decompress, ".xz": lzma.decompress, ".zst": zstd.decompress}


class WebDatasetTars(FileSource):
    """Every tar (also .tar.gz, .tgz, .tar.xz, .tar.zst) under a directory, or one tar, sorted by path."""

    kind: Literal["webdataset"] = "webdataset"
    """An existing WebDataset of text."""
    member: str = "txt"
    """Ending of the names of the members that hold text; members with a further `.gz`, `.xz` or `.zst` are
    decompressed."""
    text_field: str = "text"
    """Field that holds the text when the member is JSON."""
    licence: str = "unknown"
    """Licence to record for every document."""

    def wanted(self, name: str) -> bool:
        return name.endswith(TAR_SUFFIXES)

    def expected(self) -> str:
        return f"a WebDataset tar, or a directory of them: {', '.join(TAR_SUFFIXES)}"

    def read(self, part: Part) -> Iterator[Document | Skipped]:
        split, endings = self.split_of(part), Endings()
        with open_stream(self.root / part.name) as file:
            for member in tar_members(file, part.name):
                if isinstance(member, Skipped):
                    yield member
                    continue
                packed = next((suffix for suffix in _UNPACK if member.name.endswith(suffix)), "")
                if not member.name.removesuffix(packed).endswith(f".{self.member}"):
                    endings.leave_out(member.name)
                    continue
                where = f"{part.name}/{member.name}"
                with damage_explained(where):
                    yield self._document(_UNPACK[packed](member.data) if packed else member.data, where, split)
        yield from endings.skipped(part.name)

    def _document(self, data: bytes, where: str, split: str) -> Document | Skipped:
        text: str | bytes = data
        if self.member.rpartition(".")[2] == "json":
            try:
                text = json.loads(data)[self.text_field]
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                what = f"no text in field {self.text_field!r} ({error})"
                return Skipped(where, what, bad=True, remedy="set source.text_field")
            if text is None:
                return Skipped(where, "empty")
            if not isinstance(text, str):
                return Skipped(where, f"field {self.text_field!r} is not text (but {type(text).__name__})", bad=True)
        return Document(where, text, licence=self.licence, split=split)
