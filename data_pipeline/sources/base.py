"""The interface of a source of text: a list of parts, each of which yields documents.

Parts are the unit of parallel work, and each is read on its own. Their order, and the order of documents in them, is
the order of the corpus. So both must be the same on every machine: sort by name, never by time or by directory order.

A source reports everything that it leaves out, and does not decide what happens to bad data. It yields `Skipped` for
both, and the preparation lists it, counts it, or stops (`prepare.spool`, `prepare.corpus`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, ClassVar, NamedTuple

import numpy as np
from pydantic import BeforeValidator

from bst_base import places
from bst_base.errors import UserError
from bst_base.settings import Config


class Part(NamedTuple):
    """A piece of a source that can be read on its own."""

    name: str
    """The name by which `Source.read` finds it. It is relative to the source, so it is the same on every machine."""
    size: int
    """Bytes to read. Parts are grouped by it into tasks of about equal work."""
    start: int = -1
    """Where the part begins in a file that is cut into several parts, in a unit of the source's choice. -1: the part is
    whole."""
    stop: int = -1
    """Where it ends, in the same unit; for sources that cannot compute it from `size`."""


@dataclass(frozen=True)
class Document:
    """One text as the source holds it."""

    path: str
    """Its place in the source; unique there."""
    content: str | bytes | np.ndarray
    """The text. Bytes are decoded as UTF-8; the preparation's settings decide what happens if that fails. From sources
    of tokens: the ids, (n,) of any integer type, without the id that ends the document."""
    licence: str = "unknown"
    """SPDX identifier if there is one."""
    group: str = ""
    """Documents of one group (a work, a repository) are never put in different splits. Empty: the document is its own
    group."""
    split: str = ""
    """The split that the source assigns. Empty: the preparation decides."""
    title: str = ""
    """The title, if the source gives one."""
    meta: dict[str, Any] = field(default_factory=dict)
    """Further data of JSON types, stored with the document's tokens."""


@dataclass(frozen=True)
class Skipped:
    """Something in the source that is left out, and the reason; recorded in the corpus."""

    path: str
    reason: str
    """A short text. Reasons are counted by the part before the first ` (`, so that part should be the same for all of a
    kind."""
    bad: bool = False
    """True if something is wrong with it: `on_bad_record` decides what happens. False if it is only unwanted."""
    remedy: str = ""
    """For bad records: what else the user can do, such as "set text_field to …"."""
    count: int = 1
    """How many files or records this entry stands for."""


class Listing(NamedTuple):
    """The contents of a source."""

    parts: list[Part]
    """The parts, in the order of the corpus."""
    skipped: list[Skipped]
    """Everything else in the source, which is not read."""


class Source(Config):
    """Base of all sources: the settings, and how the source is read. It is pickled and sent to worker processes."""

    tokenized: ClassVar[bool] = False
    """Whether its documents are token ids instead of text."""
    kind: str
    """Which source it is; its other settings are those of the kind (`bst data sources KIND`)."""

    def in_use(self) -> AbstractContextManager[None]:
        """Keep other preparations from changing what this source reads, from `fetch` to the end.

        Raises UserError when another preparation uses it.
        """
        return nullcontext()

    def fetch(self) -> None:
        """Copy or download what is needed to this machine. Called once, before everything else."""

    def directory(self) -> Path | None:
        """Return the user's directory that is read with all that is in it; None if there is none."""
        return None

    def listing(self) -> Listing:
        """Return the contents of the source; raises UserError when the source is missing or empty."""
        raise NotImplementedError

    def files(self, part: Part) -> Iterable[Path]:
        """Return the files that a part is read from. A hash of their bytes identifies the source."""
        raise NotImplementedError

    def names_from(self, part: Part) -> Path | None:
        """Return the directory from which a part's text names its files; None if the text does not name them.

        Such names belong to the identity of the source. (The name of a part always does.)
        """
        return None

    def read(self, part: Part) -> Iterator[Document | Skipped]:
        """Yield the documents of one part, in order.

        It may raise OSError or UserError when the rest of the part cannot be read.
        """
        raise NotImplementedError

    def provenance(self) -> dict[str, Any]:
        """Return version information for the manifest. It must be the same for equal sources."""
        return {}


def _on_this_machine(value: Any) -> Any:
    if isinstance(value, str) and "://" in value:
        raise ValueError(
            f"must be a path on this machine's file systems; copy {value.partition('://')[0]}:// data first"
        )
    return value


LocalPath = Annotated[places.LocalPath, BeforeValidator(_on_this_machine)]
"""A path that is not an address; relative paths count from the folder of the settings file. (`Path` would read `s3://`
as a directory `s3:`.)"""


class Endings(Counter[str]):
    """Counts the files that a filter leaves out, by ending, and reports one `Skipped` for each ending."""

    def leave_out(self, name: str) -> None:
        """Count a file or archive member."""
        self[PurePosixPath(name).suffix or "no ending"] += 1

    def skipped(self, where: str) -> list[Skipped]:
        """Return what was left out below `where`."""
        prefix = f"{where}/" if where else ""
        return [
            Skipped(f"{prefix}*{'' if ending == 'no ending' else ending}", f"ending {ending}", count=count)
            for ending, count in sorted(self.items())
        ]


def existing_directory(path: Path, what: str) -> Path:
    """Return `path` if it is a directory; raises UserError, naming what was expected, if it is not."""
    path = path.expanduser()
    if not path.is_dir():
        found = "not a directory" if path.exists() else "no such directory"
        raise UserError(f"{path}: {found}; source.path must be {what}")
    return path


def join_files(files: Iterable[tuple[str, str]]) -> str:
    """Join several files to one text, each below a line with its path, in the format of `head` and `tail`."""
    return "\n".join(f"==> {printable(path)} <==\n{text}" for path, text in files)


def printable(text: str) -> str:
    r"""Return a file's name, or a text with names in it, as Unicode. Bytes that are not UTF-8 become ``\xff`` escapes,
    and lone surrogates, which names of fields may hold, ``\ud800`` escapes."""
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:
        return text.encode("utf-8", "backslashreplace").decode("utf-8")
