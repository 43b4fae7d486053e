"""Where a rank stands, for people to read: the stacks of its threads, and the exchanges that torch has recorded."""

from __future__ import annotations

import faulthandler
import socket
import time
from contextlib import suppress
from pathlib import Path

STACKS, RECORDER = "stacks", "flight-recorder"


def write_stacks(folder: Path, rank: int) -> None:
    """Write down where all threads of this rank are, and what exchanges they have begun; raises OSError."""
    (folder / RECORDER).mkdir(parents=True, exist_ok=True)
    with (folder / f"rank-{rank:05d}.txt").open("w", encoding="utf-8") as file:
        file.write(f"rank {rank} on {socket.gethostname()}, {time.strftime('%Y-%m-%dT%H:%M:%S%z')}\n")
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)
    (folder / RECORDER / f"rank_{rank}").write_bytes(recorded())


def recorded() -> bytes:
    """torch's flight recorder: the last exchanges of this rank, pickled; empty where torch has none."""
    # Here, because not every build of torch has it, and commands that only read a run directory need no torch.
    from torch._C import _distributed_c10d

    for name in ("_dump_nccl_trace", "_dump_fr_trace"):
        if hasattr(_distributed_c10d, name):
            with suppress(RuntimeError):
                return getattr(_distributed_c10d, name)()
    return b""
