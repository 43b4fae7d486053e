"""What a source of text is: a list of parts, each of which yields documents.

Parts are the unit of parallel work and are read independently; their order, and the order of documents in them, is the
order of the corpus. So both must be the same on every machine: sort by name, never by time or by directory order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from bst_base.errors import UserError
from bst_base.settings import Config


class Part(NamedTuple):
    """A piece of a source that is read on its own."""

    name: str
    """What `Source.read` needs to find it; relative to the source, so that it is the same on every machine."""
    size: int
    """Bytes to read: parts are grouped into tasks of about equal work by it."""


@dataclass(frozen=True)
class Document:
    """One text as it stands in the source."""

    path: str
    """Where it is in the source; unique there."""
    content: str | bytes
    """The text; bytes are decoded as UTF-8, and what happens when they are not is the preparation's policy."""
    licence: str = "unknown"
    """SPDX identifier where there is one."""
    group: str = ""
    """Documents of one group (a work, a repository) never end up in different splits; empty: a group of its own."""
    split: str = ""
    """The split the source itself puts the document in; empty: decided by the preparation."""
    title: str = ""
    """What people call it, if the source says."""


@dataclass(frozen=True)
class Skipped:
    """Something in the source that is not taken, and why; recorded in the corpus."""

    path: str
    reason: str


class Source(Config):
    """Base of every source: its settings, and how it is read. Sent to worker processes as it is."""

    kind: str
    """Which source it is; its other settings are those of the kind (`bst data sources KIND`)."""

    def fetch(self) -> None:
        """Bring what is needed onto this machine; called once, before anything else."""

    def parts(self) -> list[Part]:
        """Every part, in the order of the corpus; raises UserError when the source is not there or is empty."""
        raise NotImplementedError

    def read(self, part: str) -> Iterator[Document | Skipped]:
        """The documents of one part, in order."""
        raise NotImplementedError

    def provenance(self) -> dict[str, Any]:
        """Versions of what is read, for the manifest; nothing that differs between two equal sources."""
        return {}


def existing_directory(path: Path, what: str) -> Path:
    """`path`, if it is a directory; raises UserError saying what was expected there."""
    path = path.expanduser()
    if not path.is_dir():
        raise UserError(f"{path}: no such directory; source.path must be {what}")
    return path


def join_files(files: Iterable[tuple[str, str]]) -> str:
    """Several files as one text, each under a line with its path, in the form `head` and `tail` use."""
    return "\n".join(f"==> {path} <==\n{text}" for path, text in files)
