"""The two kinds of error that are told to the user in a sentence, without a traceback."""

from __future__ import annotations

import os
import socket


class UserError(ValueError):
    """Something the user gave is wrong: the message says what, where, and what to do about it.

    Commands print the message without a traceback and exit with `exit_status`; every project exception that a user
    can cause derives from it.
    """

    exit_status = 2
    """Started again, it would end the same way."""


class StorageError(UserError):
    """A file or directory could not be read or written on this host. What is in it may be as it should be.

    So nothing is given up, renamed or removed because of it, and starting again may end better.
    """

    exit_status = 74
    """EX_IOERR of sysexits.h."""

    @classmethod
    def of(cls, error: OSError, path: str | os.PathLike[str] | None = None, doing: str = "read") -> StorageError:
        """What the system said, with the host and the path it said it of."""
        where = error.filename if path is None else os.fspath(path)
        return cls(f"{socket.gethostname()} cannot {doing} {where}: {error.strerror or error}")
