"""The interface of every store of a corpus's files, and the settings for files that are not on a local disk."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Annotated, Any, Protocol

from pydantic import AfterValidator, Field, model_validator

from bst_base.addresses import SECRET
from bst_base.errors import UserError
from bst_base.places import LocalPath
from bst_base.settings import Config
from data_pipeline.store.mapped import MappedFile

_NO_SECRETS = ("", "anon", "cloud", "google_default", "cache", "browser")  # ways of getting a token, not secrets


REQUESTS = 256
"""Maximum number of reads of one rank that run in parallel over a network. If each takes T seconds and returns n
tokens, a rank that trains on R tokens per second needs R T / n of them: 67 for 40 ms, 500,000 tokens/s and documents of
300 tokens."""


class StoreConfigError(UserError):
    """The store cannot be used as it is set up: it lacks a needed feature, a setting or credentials.

    A store that cannot be reached is a `StorageError`: a restart may succeed. `on_bad_shard: skip` skips neither.
    """


def _no_secrets(options: dict[str, Any]) -> dict[str, Any]:
    if secrets := _secrets(options, ""):
        raise ValueError(
            f"{', '.join(secrets)} would be written into the run directory; put it into an environment variable "
            "and write $NAME here"
        )
    return options


def _secrets(options: dict[str, Any], prefix: str) -> list[str]:
    """Return the dotted names of options that hold a secret in plain text."""
    found = []
    for name, value in options.items():
        if isinstance(value, dict):
            found += _secrets(value, f"{prefix}{name}.")
        elif isinstance(value, str) and SECRET.search(name) and not value.startswith("$") and value not in _NO_SECRETS:
            found.append(f"{prefix}{name}")
    return found


StoreOptions = Annotated[dict[str, Any], AfterValidator(_no_secrets)]
"""Options for a store's client, without secrets in plain text."""


class StorageConfig(Config):
    """How files that are not on a local disk are fetched."""

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
            raise ValueError("cache_bytes limits the copies in cache_dir: set storage.cache_dir too")
        return self


class Storage(Protocol):
    """The files of one corpus, by name. Several threads may call every method."""

    where: str
    """The corpus's directory or address, for messages."""
    remote: bool
    """Whether reads go over a network: slow each, so many run in parallel, and any read may return damaged bytes."""

    def whole(self, name: str) -> bytes:
        """Return a file's bytes; raises FileNotFoundError when it does not exist."""

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `offset` on; raises ShardError when the file is missing or too short."""

    def mapped(self, name: str) -> MappedFile | None:
        """Return a new memory map of the file if it is on a local disk; None if it cannot be mapped."""

    def local_path(self, name: str) -> Path | None:
        """Return the file's path if its place is on a local disk, else None. The file may be missing."""

    def fetch_ahead(self, now: Sequence[str], soon: Sequence[str]) -> None:
        """Announce the files that are read from now on, and those after them. A cache fetches them in advance."""

    def interrupt(self, stop: bool) -> None:
        """Interrupt reads: while `stop` is true, reads that wait for a network or for another process raise Stopped."""

    def renew(self, name: str, attempt: int) -> bool:
        """Handle a file that was found damaged at the `attempt`-th read of the same bytes, counted from 1.

        Returns True, perhaps after a wait, if another read may give good bytes; False if not.
        """


def read_whole(storage: Storage, name: str, sha256: str) -> bytes:
    """Return a file's bytes, read again while they have another hash and another read may give good ones.

    The caller must compare the hash, and say what is wrong. Raises FileNotFoundError when there is no such file.
    """
    for attempt in count(1):
        data = storage.whole(name)
        if hashlib.sha256(data).hexdigest() == sha256 or not storage.renew(name, attempt):
            return data
    raise AssertionError("unreachable")
