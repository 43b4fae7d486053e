"""Why a rank ends, told once for the whole job: most refusals are the same on all ranks.

Rank 0 prints at once. Another rank waits, and stays silent when rank 0 has said the same. A rank that is told to stop
while it waits stays silent too: a launcher ends the others when a rank has failed, and who failed has been named. So
rank 0 waits as well where it fails only because another rank is gone.
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
"""How long a rank waits for another to speak for it."""
STAYS_S = 2.0
"""How long rank 0 stays, in whose process the board lives: what is wrong for all they find at about the same time."""
LOOK_S = 0.1
KEY = "why rank 0 ends"
_PEER_GONE = re.compile(r"[Cc]onnection (closed|reset) by peer|Broken pipe|remote process exited")


def tell(message: str, notice: Notice, peer_gone: bool = False) -> None:
    """Print why this rank ends, unless another or the launcher speaks for it; takes a few seconds where there are more.

    `peer_gone`: it ends because it has lost another rank.
    """
    rank = int(os.environ.get("RANK", 0))
    board = _board()
    if (rank or peer_gone) and _spoken_for(message, notice, board):
        return
    where = f"rank {rank} on {socket.gethostname()}: " if rank else ""
    print(f"bst train: {where}{message}", file=sys.stderr, flush=True)
    if board and not rank:
        with suppress(RuntimeError):  # under torchrun the board is its agent's, which may be gone
            board.put(KEY, message)
            time.sleep(STAYS_S)


def lost_peer(error: Exception) -> bool:
    """Whether an error only says that another rank is gone: it comes from an exchange, and tells nothing of why."""
    from torch.distributed import DistError

    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and bool(_PEER_GONE.search(str(error))))


def _spoken_for(message: str, notice: Notice, board: Board | None) -> bool:
    """Wait for rank 0 to say the same, and for a signal, unless one had come before this rank failed."""
    until, first, stopped = time.monotonic() + WAIT_S, None, notice.signal is not None
    while first is None and time.monotonic() < until:
        if notice.signal is not None and not stopped:
            return True
        if board:
            with suppress(RuntimeError):  # rank 0 is gone, and the board with it
                [first] = board.get([KEY])
        time.sleep(LOOK_S)
    if first != message:
        return False
    time.sleep(STAYS_S)  # after rank 0: the launcher names the one that ends first
    return True


def _board() -> Board | None:
    """Where the ranks of this job can leave each other a word; None before they have joined, and for one alone."""
    if "torch.distributed" not in sys.modules:
        return None
    from torch import distributed

    from bst_dist.faults.heartbeats import shared_board

    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return None
    with suppress(RuntimeError):
        return shared_board(distributed.get_world_size(), wait_s=WAIT_S)
    return None
