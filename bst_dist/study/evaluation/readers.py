"""The processes that share one evaluation: each reads some of the documents with a model of its own.

A launcher that tells its processes who they are starts them (`torchrun --no-python bst eval RUN`), or `bst eval
--ranks N` does on this machine. Nothing crosses between them but the sums of each document, at the end, over gloo.
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
from bst_base.host import free_port
from bst_base.launched import require_alone
from bst_dist.cluster.local import launch
from bst_dist.cluster.processes import Share
from bst_dist.parallel.ranks import own_device

LIMIT = timedelta(days=7)
"""How long one may wait for the slowest; that all still live is the launcher's to see."""
NOTICE = "bst eval: told to stop ({}): the ranks report what they have read; a second Ctrl-C ends them at once"
PROGRAM = (sys.executable, "-m", "bst_dist", "eval")
"""What every reader runs."""
INSTEAD = (
    "use --ranks N, `torchrun --no-python bst eval ...`, or give each process RANK, WORLD_SIZE, LOCAL_RANK, "
    "MASTER_ADDR and MASTER_PORT"
)


class ReadersError(UserError):
    """The readers ended without a result."""


@dataclass(frozen=True)
class Readers:
    """This process among those that share the evaluation."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that prints and writes for all."""
        return self.rank == 0

    def sums(self, *arrays: np.ndarray) -> list[np.ndarray]:
        """Element by element over all readers, in float64: counts stay exact."""
        if self.world == 1:
            return list(arrays)
        totals = torch.from_numpy(np.stack([array.astype(np.float64) for array in arrays]))
        distributed.all_reduce(totals)
        return [total.astype(array.dtype) for total, array in zip(totals.numpy(), arrays, strict=True)]


@contextmanager
def joined() -> Iterator[Readers]:
    """This process among those that its launcher has started, on a device of its own; alone where there is none.

    The process group is left at the end, after an error too: one of gloo's threads that still holds a tensor when the
    interpreter ends aborts the process. Raises UserError for several copies that were not told who they are: each
    would read all of the text.
    """
    if "RANK" not in os.environ:
        require_alone("evaluate all of the text", INSTEAD)
        yield Readers()
        return
    if torch.accelerator.is_available():
        torch.accelerator.set_device_index(own_device(torch.accelerator.device_count()))
    distributed.init_process_group("gloo", timeout=LIMIT)
    try:
        yield Readers(distributed.get_rank(), distributed.get_world_size())
    finally:
        distributed.destroy_process_group()


def start(options: Sequence[str], ranks: int) -> dict[str, Any]:
    """What `bst eval` with these options reports, read by so many processes of this machine.

    A Ctrl-C is passed on to them. Raises ReadersError when one has failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "report.json"
        command = [*PROGRAM, *options, "--json", str(found)]
        ended = launch(command, Share(0, ranks, ranks, "127.0.0.1", free_port()), notice=NOTICE)
        if not found.exists():
            raise ReadersError(f"no result: {ended.explain({})}")
        return json.loads(found.read_text(encoding="utf-8"))
