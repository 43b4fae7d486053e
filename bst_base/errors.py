"""The two kinds of errors that the user sees as a message without a traceback, and the name a user may have meant."""

from __future__ import annotations

import difflib
import os
import socket
from collections.abc import Iterable


class UserError(ValueError):
    """Something that the user gave is wrong. The message says what is wrong, where, and what to do about it.

    Commands print the message without a traceback and exit with `exit_status`. Every exception of this project that a
    user can cause derives from it.
    """

    exit_status = 2
    """A restart would fail in the same way."""


class StorageError(UserError):
    """A file or directory could not be read or written on this host. Its content may still be intact.

    So nothing is deleted, renamed or given up because of it, and a restart may succeed.
    """

    exit_status = 74
    """EX_IOERR of sysexits.h."""

    @classmethod
    def of(cls, error: OSError, path: str | os.PathLike[str] | None = None, doing: str = "read") -> StorageError:
        """Return the error with the system's message, the host, and the path (by default the one in `error`)."""
        where = (error.filename or "a file") if path is None else os.fspath(path)
        return cls(f"{socket.gethostname()} cannot {doing} {where}: {error.strerror or str(error) or repr(error)}")


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the known name that is most similar to `name`, for a message that asks whether it was meant.

    None if no similarity, from 0 to 1 as difflib counts it, reaches `cutoff`.
    """
    matches = difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
    return matches[0] if matches else None
