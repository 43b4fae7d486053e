"""Fixtures to read whole sources and to make their files."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.prepare.spool import refusal
from data_pipeline.sources import SOURCES, Document, Skipped


@pytest.fixture
def read_all() -> Callable[..., tuple[list[Document], dict[str, str]]]:
    """`read_all(kind, **settings)` returns the documents of a source in order, and the skipped paths with reasons.

    Raises UserError for a bad record, as a preparation with `on_bad_record: stop` does.
    """

    def read(kind: str, **settings: Any) -> tuple[list[Document], dict[str, str]]:
        source = SOURCES[kind](**settings)
        listing = source.listing()
        found = [*listing.skipped, *(item for part in listing.parts for item in source.read(part))]
        if bad := [item for item in found if isinstance(item, Skipped) and item.bad]:
            raise refusal(bad[0])
        documents = [item for item in found if isinstance(item, Document)]
        return documents, {item.path: item.reason for item in found if isinstance(item, Skipped)}

    return read


@pytest.fixture
def make_tar() -> Callable[..., bytes]:
    """`make_tar({name: content}, mode)` returns a tar archive as bytes; a content "-> target" is a symbolic link."""

    def make(members: dict[str, bytes | str], mode: str = "w:") -> bytes:
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode=mode) as tar:
            for name, data in members.items():
                info = tarfile.TarInfo(name)
                if isinstance(data, str):
                    info.type, info.linkname = tarfile.SYMTYPE, data.removeprefix("-> ")
                    tar.addfile(info)
                else:
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        return file.getvalue()

    return make


@pytest.fixture
def put(tmp_path: Path) -> Callable[..., Path]:
    """`put({path: content})` writes files below a directory and returns the directory."""

    def write(files: dict[str, bytes | str], under: str = "source") -> Path:
        for name, content in files.items():
            path = tmp_path / under / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        return tmp_path / under

    return write
