"""The processes that share one evaluation. Each reads some of the documents with its own copy of the model.

A launcher that sets RANK and the related variables starts them (`torchrun --no-python bst eval RUN`), or `bst eval
--ranks N` on this machine. They communicate only at the end: an all-reduce of the sums by document, over gloo.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed

from bst_base.errors import UserError
from bst_base.host import allow_open_files, free_port
from bst_base.launched import require_single_process
from bst_dist.cluster.local import launch
from bst_dist.cluster.processes import HostRanks
from bst_dist.parallel.interface import choose_gloo_interface
from bst_dist.parallel.ranks import own_device

LIMIT = timedelta(days=7)
"""Timeout of the process group, long enough for the slowest reader. The launcher detects processes that died."""
NOTICE = "bst eval: told to stop ({}): the ranks report what they have read; a second Ctrl-C ends them at once"
PROGRAM = (sys.executable, "-m", "bst_dist", "eval")
"""The command of every reader."""
INSTEAD = (
    "use --ranks N, `torchrun --no-python bst eval ...`, or give each process RANK, WORLD_SIZE, LOCAL_RANK, "
    "MASTER_ADDR and MASTER_PORT"
)


class ReadersError(UserError):
    """The readers ended without a result."""


@dataclass(frozen=True)
class Readers:
    """The rank of this process among the readers of an evaluation, and their number."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and writes the results."""
        return self.rank == 0

    def sums(self, *arrays: np.ndarray) -> list[np.ndarray]:
        """Return the elementwise sums over all readers. They are computed in float64, so that counts stay exact."""
        if self.world == 1:
            return list(arrays)
        totals = torch.from_numpy(np.stack([array.astype(np.float64) for array in arrays]))
        distributed.all_reduce(totals)
        return [total.astype(array.dtype) for total, array in zip(totals.numpy(), arrays, strict=True)]


@contextmanager
def joined() -> Iterator[Readers]:
    """Join the process group of the launcher, each process with its own device; without a launcher, read alone.

    The process group is destroyed at the end, also after an error: a gloo thread that still holds a tensor when the
    interpreter ends aborts the process. Raises UserError if several copies run without RANK, because each would read
    all of the text.
    """
    if "RANK" not in os.environ:
        require_single_process("evaluate all of the text", INSTEAD)
        yield Readers()
        return
    if torch.accelerator.is_available():
        torch.accelerator.set_device_index(own_device(torch.accelerator.device_count()))
    allow_open_files()  # rank 0 holds a connection of every rank
    choose_gloo_interface()
    distributed.init_process_group("gloo", timeout=LIMIT)
    try:
        yield Readers(distributed.get_rank(), distributed.get_world_size())
    finally:
        distributed.destroy_process_group()


def start(options: Sequence[str], ranks: int) -> dict[str, Any]:
    """Run `bst eval` with these options in `ranks` processes on this machine, and return its report.

    A Ctrl-C is passed on to the processes. Raises ReadersError if there is no report because a process failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "report.json"
        command = [*PROGRAM, *options, "--json", str(found)]
        ended = launch(command, HostRanks(0, ranks, ranks, "127.0.0.1", free_port()), notice=NOTICE)
        if not found.exists():
            raise ReadersError(f"no result: {ended.explain({})}")
        return json.loads(found.read_text(encoding="utf-8"))
