"""What every store of a corpus's files offers, and how those that are not on this machine's disk are read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Protocol

from pydantic import AfterValidator, Field, model_validator

from bst_base.addresses import SECRET
from bst_base.errors import UserError
from bst_base.places import LocalPath
from bst_base.settings import Config
from data_pipeline.store.mapped import MappedFile

_NO_SECRETS = ("", "anon", "cloud", "google_default", "cache", "browser")  # ways of fetching a token, not tokens


REQUESTS = 256
"""Reads of one rank that may be under way at a time, over a network. Where each takes T seconds and brings n tokens, a
rank that trains on R tokens a second needs R T / n of them: 67 at 40 ms, 500,000 a second and documents of 300."""


class StorageError(UserError):
    """A store that cannot be reached, or does not do what is needed of it; never skipped as a bad shard is."""


def _no_secrets(options: dict[str, Any]) -> dict[str, Any]:
    if secrets := _secrets(options, ""):
        raise ValueError(
            f"{', '.join(secrets)} would be written into the run directory; put it into an environment variable "
            "and write $NAME here"
        )
    return options


def _secrets(options: dict[str, Any], prefix: str) -> list[str]:
    """The dotted names of options that hold a secret in plain text."""
    found = []
    for name, value in options.items():
        if isinstance(value, dict):
            found += _secrets(value, f"{prefix}{name}.")
        elif isinstance(value, str) and SECRET.search(name) and not value.startswith("$") and value not in _NO_SECRETS:
            found.append(f"{prefix}{name}")
    return found


StoreOptions = Annotated[dict[str, Any], AfterValidator(_no_secrets)]
"""What a store's client is told, without secrets in plain text."""


class StorageConfig(Config):
    """How files that are not on this machine's disk are fetched."""

    cache_dir: LocalPath | None = None
    """Cache for verified copies of whole shards, shared by all processes of a machine. Shards of the current and the
    next shuffle window are fetched ahead. null: no cache; every use reads byte ranges from the store."""
    cache_bytes: int | None = Field(None, ge=1, le=2**62)
    """Maximum size of the cache; the least recently used copies are removed. null: it may grow to the size of the
    corpora."""
    attempts: int = Field(6, ge=1, le=1000)
    """How often to try a read before it is an error."""
    backoff_s: float = Field(0.5, ge=0, le=1e9, allow_inf_nan=False)
    """Seconds before the second attempt; doubled for each further one, up to 30."""
    timeout_s: float = Field(30.0, gt=0, le=1e9, allow_inf_nan=False)
    """Give up an attempt after this many seconds without a byte."""
    deadline_s: float = Field(300.0, gt=0, le=1e9, allow_inf_nan=False)
    """Give up an attempt after this many seconds, even if bytes still arrive."""
    options: StoreOptions = Field(default_factory=dict)
    """Passed to the fsspec file system: an endpoint, a profile, a project. `$NAME` is read from the environment. Keys,
    tokens and passwords must be given this way, because the recipe is written into the run directory."""
    allow_pipe: bool = False
    """Run the shell commands in `pipe:` addresses. Only for recipes whose author you trust."""

    @model_validator(mode="after")
    def _limit_has_a_cache(self) -> StorageConfig:
        if self.cache_bytes is not None and self.cache_dir is None:
            raise ValueError("cache_bytes limits the copies in cache_dir: set that too")
        return self


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

    def mapped(self, name: str) -> MappedFile | None:
        """The file in memory, mapped anew, where it lies on this machine's disk; None where it cannot be mapped."""

    def local_path(self, name: str) -> Path | None:
        """The file's path where it belongs on this machine's disk."""

    def fetch_ahead(self, now: Sequence[str], soon: Sequence[str]) -> None:
        """Told of the files that are read from now on, and of those after them: a cache fetches them."""

    def interrupt(self, stop: bool) -> None:
        """While `stop` is true, reads that wait for a network, or for another process, raise Stopped."""

    def renew(self, name: str) -> bool:
        """Called on a file that was found damaged: true when another copy was fetched, so that reading may succeed."""
