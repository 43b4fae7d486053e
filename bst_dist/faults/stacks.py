"""Diagnostics of a rank that hangs: the stacks of its threads, and torch's record of its collectives."""

from __future__ import annotations

import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType

STACKS, RECORDER = "stacks", "flight-recorder"


def write_stacks(folder: Path, rank: int) -> None:
    """Write the stacks of all threads of this rank and torch's flight recorder into `folder`; raises OSError."""
    (folder / RECORDER).mkdir(parents=True, exist_ok=True)
    with (folder / f"rank-{rank:05d}.txt").open("w", encoding="utf-8") as file:
        file.write(f"rank {rank} on {socket.gethostname()}, {time.strftime('%Y-%m-%dT%H:%M:%S%z')}\n\n")
        file.write(stacks_of_threads())
    (folder / RECORDER / f"rank_{rank}").write_bytes(dump_flight_recorder())


def stacks_of_threads() -> str:
    """Return the stacks of all threads of this process: the main thread first, most recent calls first.

    faulthandler prints only the newest 100 threads, so the main thread of a rank with many readers would be missing,
    and it prints no names. Source lines are not included: reading them could wait for a hanging file system.
    """
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = sys._current_frames()
    main = threading.main_thread().ident
    return "\n".join(
        _stack(names.get(ident, "without a name"), ident, frames[ident])
        for ident in sorted(frames, key=lambda ident: ident != main)
    )


def _stack(name: str, ident: int, frame: FrameType | None) -> str:
    lines = [f"thread {name} (0x{ident:x}), most recent call first:"]
    while frame:
        lines.append(f'  File "{frame.f_code.co_filename}", line {frame.f_lineno} in {frame.f_code.co_qualname}')
        frame = frame.f_back
    return "\n".join(lines) + "\n"


def dump_flight_recorder() -> bytes:
    """Return torch's flight recorder: the last collectives of this rank, pickled; empty if torch has none."""
    # Imported here: not every build of torch has it, and commands that only read a run directory need no torch.
    from torch._C import _distributed_c10d

    for name in ("_dump_nccl_trace", "_dump_fr_trace"):
        if hasattr(_distributed_c10d, name):
            with suppress(RuntimeError):
                return getattr(_distributed_c10d, name)()
    return b""
