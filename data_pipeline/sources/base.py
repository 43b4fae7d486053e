"""What a source of text is: a list of parts, each of which yields documents.

Parts are the unit of parallel work and are read independently; their order, and the order of documents in them, is the
order of the corpus. So both must be the same on every machine: sort by name, never by time or by directory order.

A source never leaves anything out silently, and never decides what to do about data that is wrong: it yields `Skipped`
for both, and the preparation lists it, counts it, or stops (`prepare.records`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, ClassVar, NamedTuple

import numpy as np
from pydantic import BeforeValidator

from bst_base import places
from bst_base.errors import UserError
from bst_base.settings import Config


class Part(NamedTuple):
    """A piece of a source that is read on its own."""

    name: str
    """What `Source.read` needs to find it; relative to the source, so that it is the same on every machine."""
    size: int
    """Bytes to read: parts are grouped into tasks of about equal work by it."""
    start: int = -1
    """Where the part begins in a file that is cut into several, in units of the source's own; -1: the part is whole."""
    stop: int = -1
    """Where it ends, likewise, for sources that cannot tell from `size`."""


@dataclass(frozen=True)
class Document:
    """One text as it stands in the source."""

    path: str
    """Where it is in the source; unique there."""
    content: str | bytes | np.ndarray
    """The text; bytes are decoded as UTF-8, and what happens when they are not is the preparation's policy. Of sources
    of tokens: the ids, (n,) of any integer type, without the one that ends the document."""
    licence: str = "unknown"
    """SPDX identifier where there is one."""
    group: str = ""
    """Documents of one group (a work, a repository) never end up in different splits; empty: a group of its own."""
    split: str = ""
    """The split the source itself puts the document in; empty: decided by the preparation."""
    title: str = ""
    """What people call it, if the source says."""
    meta: dict[str, Any] = field(default_factory=dict)
    """Further facts, in JSON's types, that are stored beside the document's tokens."""


@dataclass(frozen=True)
class Skipped:
    """Something in the source that is not taken, and why; recorded in the corpus."""

    path: str
    reason: str
    """Short, and the same for all of its kind: they are counted by it, up to a first ` (`."""
    bad: bool = False
    """Something is wrong with it (as opposed to: it is not wanted), so `on_bad_record` says what happens."""
    remedy: str = ""
    """For what is bad: what else the user can do about it, as "set text_field to …"."""
    count: int = 1
    """How many things this stands for."""


class Listing(NamedTuple):
    """What is in a source."""

    parts: list[Part]
    """In the order of the corpus."""
    skipped: list[Skipped]
    """What is there beside them and is not read."""


class Source(Config):
    """Base of every source: its settings, and how it is read. Sent to worker processes as it is."""

    tokenized: ClassVar[bool] = False
    """Whether its documents are token ids instead of text."""
    kind: str
    """Which source it is; its other settings are those of the kind (`bst data sources KIND`)."""

    def fetch(self) -> None:
        """Bring what is needed onto this machine; called once, before anything else."""

    def listing(self) -> Listing:
        """What there is to read; raises UserError when the source is not there or is empty."""
        raise NotImplementedError

    def files(self, part: Part) -> Iterable[Path]:
        """The files that a part is read from: their bytes identify the source."""
        raise NotImplementedError

    def read(self, part: Part) -> Iterator[Document | Skipped]:
        """The documents of one part, in order; may raise OSError or UserError when the rest of it cannot be read."""
        raise NotImplementedError

    def provenance(self) -> dict[str, Any]:
        """Versions of what is read, for the manifest; nothing that differs between two equal sources."""
        return {}


def _on_this_machine(value: Any) -> Any:
    if isinstance(value, str) and "://" in value:
        raise ValueError(
            f"must be a path on this machine's file systems; copy {value.partition('://')[0]}:// data first"
        )
    return value


LocalPath = Annotated[places.LocalPath, BeforeValidator(_on_this_machine)]
"""A path that is no address: `Path` would make a directory `s3:` of one; relative, from the folder of its file."""


class Endings(Counter[str]):
    """Counts what a filter leaves out by the ending of its name, and reports it as one `Skipped` an ending."""

    def leave_out(self, name: str) -> None:
        """Count a file or member."""
        self[PurePosixPath(name).suffix or "no ending"] += 1

    def skipped(self, where: str) -> list[Skipped]:
        """What was left out below `where`."""
        prefix = f"{where}/" if where else ""
        return [
            Skipped(f"{prefix}*{'' if ending == 'no ending' else ending}", f"ending {ending}", count=count)
            for ending, count in sorted(self.items())
        ]


def existing_directory(path: Path, what: str) -> Path:
    """`path`, if it is a directory; raises UserError saying what was expected there."""
    path = path.expanduser()
    if not path.is_dir():
        found = "not a directory" if path.exists() else "no such directory"
        raise UserError(f"{path}: {found}; source.path must be {what}")
    return path


def join_files(files: Iterable[tuple[str, str]]) -> str:
    """Several files as one text, each under a line with its path, in the form `head` and `tail` use."""
    return "\n".join(f"==> {printable(path)} <==\n{text}" for path, text in files)


def printable(path: str) -> str:
    r"""A file's name as Unicode text: bytes that are not UTF-8 are written as ``\xff``."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
