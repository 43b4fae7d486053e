"""Prints why a rank ends, once for the whole job: most errors are the same on all ranks.

Rank 0 prints immediately. Another rank waits, and prints nothing if rank 0 has reported the same error. It also prints
nothing if it receives a signal while it waits: then the launcher has already named the rank that failed and ends the
others. So rank 0 waits too when it fails only because another rank is gone.
"""

from __future__ import annotations

import os
import re
import socket
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from bst_dist.faults.signals import Notice

if TYPE_CHECKING:
    from bst_dist.faults.heartbeats import Board

WAIT_S = 5.0
"""Seconds that a rank waits for another rank to report the error."""
STAYS_S = 2.0
"""Seconds that rank 0 keeps running after its message, so that other ranks can read it from the board in its process;
an error common to all ranks occurs on all of them at about the same time."""
LOOK_S = 0.1
KEY = "why rank 0 ends"
_PEER_GONE = re.compile(r"[Cc]onnection (closed|reset) by peer|Broken pipe|remote process exited")


def report_once(message: str, notice: Notice, peer_gone: bool = False) -> None:
    """Print why this rank ends, unless rank 0 or the launcher reports it; takes some seconds with several ranks.

    `peer_gone`: this rank ends because another rank is gone.
    """
    rank = int(os.environ.get("RANK", 0))
    board = _board()
    if (rank or peer_gone) and _spoken_for(message, notice, board):
        return
    where = f"rank {rank} on {socket.gethostname()}: " if rank else ""
    print(f"bst train: {where}{message}", file=sys.stderr, flush=True)
    if board and not rank:
        with suppress(RuntimeError):  # under torchrun the board is in the agent's process, which may be gone
            board.put(KEY, message)
            time.sleep(STAYS_S)


def lost_peer(error: Exception) -> bool:
    """Whether an error only means that another rank is gone: it comes from communication and does not say why."""
    from torch.distributed import DistError

    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and bool(_PEER_GONE.search(str(error))))


def _spoken_for(message: str, notice: Notice, board: Board | None) -> bool:
    """Wait up to WAIT_S for rank 0 to report the same error, or for a signal; return whether either happened.

    A signal that arrived before this rank failed does not count.
    """
    until = time.monotonic() + WAIT_S
    first = None
    stopped = notice.signal is not None
    while first is None and time.monotonic() < until:
        if notice.signal is not None and not stopped:
            return True
        if board:
            with suppress(RuntimeError):  # rank 0 and its board are gone
                [first] = board.get([KEY])
        time.sleep(LOOK_S)
    if first != message:
        return False
    time.sleep(STAYS_S)  # end after rank 0: the launcher names the rank that ends first
    return True


def _board() -> Board | None:
    """Return the Board of this job's ranks; None before they have joined, and for a job of one rank."""
    if "torch.distributed" not in sys.modules:
        return None
    from torch import distributed

    from bst_dist.faults.heartbeats import shared_board

    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return None
    with suppress(RuntimeError):
        return shared_board(distributed.get_world_size(), wait_s=WAIT_S)
    return None
