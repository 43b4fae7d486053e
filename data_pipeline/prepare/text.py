"""From a source's bytes to the text that is stored: decoded and, only if asked, normalised."""

from __future__ import annotations

import dataclasses
import unicodedata
from typing import Literal

from bst_base.errors import UserError
from bst_base.settings import Config
from data_pipeline.sources.base import Document, Skipped


class TextConfig(Config):
    """What is done to a document's text before it is stored; by default nothing."""

    undecodable: Literal["stop", "skip", "replace", "latin-1"] = "stop"
    """A document that is not UTF-8: stop with its name and the byte, skip and record it, put U+FFFD for each bad byte,
    or read it as Latin-1."""
    normalise: tuple[Literal["newlines", "nfc"], ...] = ()
    """Steps, in order: `newlines` writes CR LF and CR as LF, `nfc` composes Unicode characters."""


def stored_text(found: Document | Skipped, config: TextConfig) -> tuple[Document, bytes] | Skipped:
    """The document and its final text as UTF-8, or why it is skipped; raises UserError for text that is not UTF-8."""
    if isinstance(found, Skipped):
        return found
    text = found.content
    if isinstance(text, bytes):
        decoded = _decode(text, found.path, config)
        if isinstance(decoded, Skipped):
            return decoded
        text = decoded
    for step in config.normalise:
        text = (
            text.replace("\r\n", "\n").replace("\r", "\n") if step == "newlines" else unicodedata.normalize("NFC", text)
        )
    if not text:
        return Skipped(found.path, "empty")
    try:
        return dataclasses.replace(found, content=""), text.encode()
    except UnicodeEncodeError as error:  # a lone surrogate, which JSON can spell
        return Skipped(found.path, f"not Unicode text: {error.reason} (character {error.start})")


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
    raise UserError(f"{path}: {problem}; mend the file, or set text.undecodable to skip, replace or latin-1")
