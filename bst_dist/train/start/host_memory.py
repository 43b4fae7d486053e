"""Whether a host has the memory in which its ranks build the model, all at the same time."""

from __future__ import annotations

import os
import socket
import sys

from bst_base.memory import available_memory
from bst_base.sizes import counted, readable_size
from bst_dist.model.meta_device import weightless
from bst_dist.parallel.devices import local_rank
from bst_dist.plan.memory.zero import WORD
from bst_dist.train.start.request import Start

RANKS_OF_HOST = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")
"""Environment variables with the number of ranks on this host: of torchrun and this project's launchers, and of
DeepSpeed's."""


def shortage(parameters: int, ranks: int, available: int | None) -> str | None:
    """Return a message that the ranks of a host need more memory for building the model than is available.

    Every rank builds the whole model in single precision before DeepSpeed moves or shards it. None if the memory
    suffices, or if it is unknown (`available` is None).
    """
    needed = WORD * parameters * ranks
    if available is None or available >= needed:
        return None
    return (
        f"{counted(ranks, 'rank')} {'needs' if ranks == 1 else 'need'} {readable_size(needed)} of host memory to build "
        f"the model, {readable_size(available)} are available: start fewer ranks on a host, or give the job more "
        "memory (Slurm: --mem=0)"
    )


def warn_of_shortage(start: Start) -> None:
    """Print a warning on the first rank of a host that has too little memory to build the model.

    It is no error, because some file systems' caches (ZFS) do not count as available. Without a variable in
    RANKS_OF_HOST the need is unknown, and nothing is printed.
    """
    ranks = next((int(os.environ[name]) for name in RANKS_OF_HOST if os.environ.get(name, "").isdigit()), None)
    if ranks is None or local_rank(os.environ):
        return
    available = available_memory()  # before the other ranks of the host begin to build
    with weightless():
        parameters = sum(parameter.numel() for parameter in start.objective.model().parameters())
    if message := shortage(parameters, ranks, available):
        print(f"bst train: {socket.gethostname()}: {message}", file=sys.stderr, flush=True)
