"""Exit statuses of a rank, of `bst train`, and of whatever starts them again."""

from __future__ import annotations

from bst_base.errors import StorageError
from bst_base.stopping import Stopped

DONE = 0
"""The steps asked for are done."""
FAILED = 1
"""An error that is not the user's; the traceback says where."""
USER_ERROR = 2
"""Something given is wrong, or the run diverged: started again, it would end the same way."""
HUNG = 70
"""The ranks stood still and the watchdog ended them (EX_SOFTWARE of sysexits.h): start again from the checkpoint."""
UNREADABLE = StorageError.exit_status
"""A host could not read or write a file (EX_IOERR of sysexits.h): nothing was given up for it, start again."""
RESUBMIT = Stopped.exit_status
"""Stopped by a signal, with a checkpoint (EX_TEMPFAIL of sysexits.h): start again, and the run continues."""
