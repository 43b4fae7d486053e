"""From a source's bytes to the stored text: decoding and, if asked for, normalisation and filters."""

from __future__ import annotations

import dataclasses
import json
import unicodedata
from typing import Annotated, Literal

import numpy as np
from pydantic import AfterValidator

from bst_base.places import NameOrPath
from bst_base.settings import Config
from data_pipeline.prepare.filters import check_name, filtered
from data_pipeline.sources.base import Document, Skipped

_PACKED = {  # first bytes of a file: its format, and what to do with it
    b"\x1f\x8b": ("gzip", "let its name end in .gz, and source.pattern match that"),
    b"\xfd7zXZ": ("xz", "let its name end in .xz, and source.pattern match that"),
    b"\x28\xb5\x2f\xfd": ("zstd", "let its name end in .zst, and source.pattern match that"),
    b"PK\x03\x04": ("zip", "unpack it"),
    b"PAR1": ("Parquet", "read it with the source parquet"),
}

TOKEN = np.dtype("<u4")
"""The dtype in which the token ids of a tokenized source are kept in the spool."""


class TextConfig(Config):
    """Processing of a document's text before it is stored. By default the text does not change."""

    undecodable: Literal["stop", "skip", "replace", "latin-1"] = "stop"
    """What to do with a document that is not UTF-8: follow `on_bad_record`, skip and record it, replace each bad byte
    by U+FFFD, or read it as Latin-1."""
    normalise: tuple[Literal["newlines", "nfc"], ...] = ()
    """Steps, in order: `newlines` writes CR LF and CR as LF, `nfc` composes Unicode characters."""
    filters: tuple[Annotated[NameOrPath, AfterValidator(check_name)], ...] = ()
    """Then your own functions, in this order, which change texts or drop documents: path/to/file.py:function. They run
    with your rights: use only those that you trust."""


def stored_text(found: Document | Skipped, config: TextConfig) -> tuple[Document, bytes] | Skipped:
    """Return the document and its final text as UTF-8, or its ids as TOKEN; or the reason why it is skipped."""
    if isinstance(found, Skipped):
        return found
    text = found.content
    if isinstance(text, np.ndarray):
        return dataclasses.replace(found, content=""), text.astype(TOKEN).tobytes()
    if isinstance(text, bytes):
        decoded = _decode(text, found.path, config)
        if isinstance(decoded, Skipped):
            return decoded
        text = decoded
    for step in config.normalise:
        text = (
            text.replace("\r\n", "\n").replace("\r", "\n") if step == "newlines" else unicodedata.normalize("NFC", text)
        )
    for name in config.filters:
        text = filtered(text, found, name)
        if isinstance(text, Skipped):
            return text
    if not text:
        return Skipped(found.path, "empty")
    if isinstance(data := _encoded(text, found.path), Skipped):
        return data
    names = {"title": found.title, "licence": found.licence, "group": found.group}
    for name, value in {**names, "meta": json.dumps(found.meta, ensure_ascii=False)}.items():
        if isinstance(wrong := _encoded(value, found.path, f" in its {name}"), Skipped):
            return wrong
    return dataclasses.replace(found, content=""), data


def _encoded(text: str, path: str, where: str = "") -> bytes | Skipped:
    try:
        return text.encode()
    except UnicodeEncodeError as error:  # a lone surrogate, which JSON can contain
        return Skipped(path, f"not Unicode text{where}: {error.reason} (character {error.start})")


def _decode(data: bytes, path: str, config: TextConfig) -> str | Skipped:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        if config.undecodable == "latin-1":
            return data.decode("latin-1")
        if config.undecodable == "replace":
            return data.decode("utf-8", errors="replace")
        problem = f"not UTF-8 (byte {error.start} is 0x{data[error.start]:02x})"
        if config.undecodable == "skip":
            return Skipped(path, problem)
        for magic, (packed, remedy) in _PACKED.items():
            if data.startswith(magic):
                return Skipped(path, f"{packed} data, not text", bad=True, remedy=remedy)
    return Skipped(path, problem, bad=True, remedy="set text.undecodable to skip, replace or latin-1")
