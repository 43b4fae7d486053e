"""arXiv: the TeX source of papers, from bulk archives or single submissions, one document per paper."""

from __future__ import annotations

import gzip
import io
import re
import tarfile
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Literal

from bst_base.errors import UserError
from data_pipeline.sources.archive import Member, damage_explained, open_stream, tar_members
from data_pipeline.sources.base import Document, Endings, Part, Skipped, join_files
from data_pipeline.sources.tex import decode_tex, find_main_file, paper_text, strip_comments
from data_pipeline.sources.tree import FileSource

_TEX = (".tex", ".ltx", ".latex")
_LARGEST_PAPER = 1 << 29  # unpacked bytes: more is not a paper, and would not fit into a worker's memory


class Arxiv(FileSource):
    """Papers from `arXiv_src_*.tar` (many submissions in one archive) or single `<id>.tar.gz`, `<id>.gz`, `<id>.tex`.

    A submission is a gzipped tar or one gzipped TeX file. Its main file is found, and its inputs are inserted in their
    places. If there is no main file, all TeX files are joined. A submission without TeX source is skipped.
    """

    kind: Literal["arxiv"] = "arxiv"
    """TeX sources of arXiv papers, as distributed."""
    comments: Literal["keep", "strip"] = "strip"
    """What to do with TeX comments, and with text after the end of the document: authors did not mean to publish
    them."""
    licence: str = "arXiv, by paper"
    """Licence to record for every document."""

    def wanted(self, name: str) -> bool:
        return name.endswith((".tar", ".gz", *_TEX))

    def expected(self) -> str:
        return "arXiv_src_*.tar, a submission (.tar.gz, .gz, .tex), or a directory of them"

    def read(self, part: Part) -> Iterator[Document | Skipped]:
        path, split = self.root / part.name, self.split_of(part)
        if path.suffix != ".tar":
            yield from self._paper(part.name, path.read_bytes(), split)
            return
        with open_stream(path) as file:
            for member in tar_members(file, part.name):
                if isinstance(member, Skipped):
                    yield member
                elif member.name.endswith((".gz", *_TEX)):
                    yield from self._member(part, member, split)
                else:
                    yield Skipped(f"{part.name}/{member.name}", "no TeX source")

    def _member(self, part: Part, member: Member, split: str) -> Iterator[Document | Skipped]:
        """Yield the document of a submission in a bulk archive. If it is damaged, the others are still read."""
        try:
            yield from self._paper(member.name, member.data, split)
        except UserError as error:
            yield Skipped(f"{part.name}/{member.name}", str(error).removeprefix(f"{member.name}: "), bad=True)

    def _paper(self, name: str, data: bytes, split: str) -> Iterator[Document | Skipped]:
        """Yield the document of a submission, and what was skipped of it."""
        number = re.sub(r"(\.tar)?\.gz$|\.tex$", "", name)
        data = _gunzip(data, name)
        if data is None:
            yield Skipped(name, "larger than a paper")
            return
        files: dict[str, str] = {}
        endings = Endings()
        for member in _submission(data, PurePosixPath(number).name, name):
            if isinstance(member, Skipped):
                yield member
            elif member.name.lower().endswith(_TEX):
                files[member.name.removeprefix("./")] = member.data.decode("latin-1")  # as bytes: TeX's syntax is ASCII
            else:
                endings.leave_out(member.name)
        yield from endings.skipped(name)
        if not files:
            yield Skipped(name, "no TeX source")
            return
        yield Document(number, decode_tex(self._text(files).encode("latin-1")), licence=self.licence, split=split)

    def _text(self, files: dict[str, str]) -> str:
        main = find_main_file(files)
        if main is not None:
            return paper_text(main, files, self.comments)
        if self.comments == "strip":
            files = {name: strip_comments(text) for name, text in files.items()}
        return join_files(sorted(files.items()))


def _gunzip(data: bytes, where: str) -> bytes | None:
    """Return the bytes of a submission; None when they are too many for a paper."""
    if data[:2] != b"\x1f\x8b":
        return data
    with damage_explained(where):
        unpacked = gzip.GzipFile(fileobj=io.BytesIO(data)).read(_LARGEST_PAPER + 1)
    return None if len(unpacked) > _LARGEST_PAPER else unpacked


def _submission(data: bytes, stem: str, where: str) -> Iterator[Member | Skipped]:
    """Yield the files of a submission: the members of a tar, or a single TeX file."""
    if tarfile.is_tarfile(io.BytesIO(data)):
        yield from tar_members(io.BytesIO(data), where)
    elif not data.startswith(b"%PDF") and b"\\" in data:
        yield Member(f"{stem}.tex", data)
