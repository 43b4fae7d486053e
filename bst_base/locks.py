"""Locks of files between processes (`flock`), with a message where the file system has none."""

from __future__ import annotations

import errno
import fcntl
from pathlib import Path
from typing import IO

from bst_base.errors import UserError
from bst_base.files import path_in_errors

_NONE_HERE = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


class NoLocksError(UserError):
    """The file system of a lock file has no locks."""


def flock(file: int | IO[str], path: Path, wait: bool = False) -> bool:
    """Lock an open file until it is closed; return False if another process holds the lock and `wait` is false.

    `path`: its path, for the message of NoLocksError when its file system has no locks.
    """
    try:
        with path_in_errors(path):
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NONE_HERE:
            raise
        raise NoLocksError(
            f"{path}: cannot be locked, because its file system has no flock ({error.strerror}): mount it with locks "
            "(Lustre: -o flock; NFS: version 4), or choose a directory on another one"
        ) from None
    return True
