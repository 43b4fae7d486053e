"""What every store of a corpus's files offers, and how those that are not on this machine's disk are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from pydantic import Field

from bst_base.errors import UserError
from bst_base.settings import Config


class StorageError(UserError):
    """A store that cannot be reached, or does not do what is needed of it; never skipped as a bad shard is."""


class StorageConfig(Config):
    """How files that are not on this machine's disk are fetched."""

    cache_dir: Path | None = None
    """Directory for verified copies of whole shards, shared by all processes of a machine; without one, ranges of the
    shards are read from the store at every use. It may grow to the size of the corpora."""
    attempts: int = Field(6, ge=1)
    """How often one read is tried before it is an error."""
    backoff_s: float = Field(0.5, ge=0)
    """Seconds before the second attempt; doubled for each further one, up to 30."""
    timeout_s: float = Field(30.0, gt=0)
    """Seconds without a byte after which an attempt is given up."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Passed to the fsspec file system: an endpoint, a profile, a project."""
    allow_pipe: bool = False
    """Run the shell commands of `pipe:` addresses; only for recipes whose author you trust."""


class Storage(Protocol):
    """The files of one corpus, by name; every method may be called from several threads."""

    where: str
    """The corpus's directory or address, for messages."""
    remote: bool
    """Reads go over a network: slow each, many at a time, and good bytes may arrive damaged the next time."""

    def whole(self, name: str) -> bytes:
        """A file's bytes; raises FileNotFoundError when it does not exist."""

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `offset` on; raises ShardError when the file is missing or too short."""

    def view(self, name: str, offset: int, size: int) -> memoryview:
        """The same bytes in place, not yet read; only where `remote` is false."""

    def local_path(self, name: str) -> Path | None:
        """The file's path where it belongs on this machine's disk."""

    def renew(self, name: str) -> bool:
        """Called on a file that was found damaged: true when another copy was fetched, so that reading may succeed."""
