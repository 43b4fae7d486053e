"""Exit statuses of a rank and of `bst train`. Schedulers and `bst launch` decide by them whether to restart."""

from __future__ import annotations

from bst_base.errors import StorageError
from bst_base.stopping import Stopped

DONE = 0
"""All requested steps are done."""
FAILED = 1
"""An unexpected error; the traceback shows where."""
USER_ERROR = 2
"""The arguments or the recipe are wrong, or the run diverged: a restart would end in the same way."""
HUNG = 70
"""The ranks hung and the watchdog ended them (EX_SOFTWARE of sysexits.h): restart from the checkpoint."""
UNREADABLE = StorageError.exit_status
"""A host could not read or write a file (EX_IOERR of sysexits.h): the run itself is intact, restart it."""
RESUBMIT = Stopped.exit_status
"""Stopped by a signal (EX_TEMPFAIL of sysexits.h): start again. A rank that was training has written a checkpoint."""
