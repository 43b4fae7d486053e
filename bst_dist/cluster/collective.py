"""A rank that only looks whether all ranks compute and talk: multiplies, joins the group, adds to a sum, compares how
fast it multiplies with the others, and leaves.

What fails here in seconds would fail in training after the whole model has been built; and one slow accelerator would
hold up all others for as long as the run lasts.
"""

from __future__ import annotations

import os
import socket
import statistics
import sys
import time
from collections.abc import Sequence
from datetime import timedelta

import torch
from torch import distributed

from bst_dist.faults.status import USER_ERROR
from bst_dist.parallel.devices import cpu_refusal

TIMEOUT = timedelta(seconds=300)
"""Hundreds of ranks import torch from one file system that none of them has read yet: that takes minutes."""
SIZE = 512
"""Rows of the matrices: enough for every multiprocessor to have a part of them."""
TIMED_SIZE = 8192
"""Rows of those that are timed: milliseconds of an accelerator, where a launch takes microseconds."""
WARM_S = 0.5
"""So long an accelerator multiplies before it is timed: its clock rises from idle in that time."""
SLOW = 1.5
"""Times the median of all ranks: sound accelerators of one kind differ by a tenth."""
ANY_SPEED = "--any-speed"
"""The argument with which a slow accelerator is named, and is no failure."""


def multiplies(device: torch.device) -> bool:
    """Whether the device gets a product of two matrices right: of small whole numbers, exact in every precision."""
    rows = torch.arange(SIZE)
    left, right = (rows[:, None] + rows) % 7, (rows[:, None] * rows) % 5
    found = left.to(device, torch.float32) @ right.to(device, torch.float32)
    return torch.equal(found.cpu().long(), left @ right)


def is_timed(device: torch.device) -> bool:
    """Whether the time of a product says anything: ranks share the cores of a CPU."""
    return device.type != "cpu"


def seconds_of_product(device: torch.device, size: int = TIMED_SIZE, warm_s: float = WARM_S) -> float:
    """Of the quickest of several products of two matrices in bf16."""
    wait = torch.accelerator.synchronize if is_timed(device) else lambda: None
    matrix = torch.ones(size, size, dtype=torch.bfloat16, device=device)
    found, begun = [], time.monotonic()
    while len(found) < 10 or time.monotonic() - begun < warm_s:
        wait()
        since = time.monotonic()
        matrix @ matrix
        wait()
        found.append(time.monotonic() - since)
    return min(found)


def slowness(seconds: Sequence[float], rank: int) -> str | None:
    """What is wrong with a rank that takes these seconds, one for each rank; None when it keeps up."""
    times = seconds[rank] / statistics.median(seconds)
    if times <= SLOW:
        return None
    return (f"takes {times:.1f} times as long as the median rank for a matrix product: is another program using it, "
            "or is it throttled by heat or a power limit?")  # fmt: skip


def main() -> int:
    """Returns the exit status: 0 when every rank was heard and keeps up."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    device = torch.device("cpu") if accelerator is None else torch.device(accelerator, int(os.environ["LOCAL_RANK"]))
    if accelerator is not None:
        torch.accelerator.set_device_index(device.index)
    if accelerator is None and (refusal := cpu_refusal(os.environ)) is not None:
        print(f"rank {rank} on {socket.gethostname()}: {refusal}", file=sys.stderr)
        return USER_ERROR
    if not multiplies(device):
        print(f"rank {rank} on {socket.gethostname()}: {device} computes a wrong matrix product", file=sys.stderr)
        return 1
    try:
        distributed.init_process_group(timeout=TIMEOUT, device_id=None if accelerator is None else device)
        total = torch.ones(1, device=device)
        distributed.all_reduce(total)
        heard = int(total.item())
        slow = slowness(_of_all_ranks(seconds_of_product(device), device), rank) if is_timed(device) else None
        distributed.destroy_process_group()
    except (RuntimeError, ValueError) as error:
        print(f"rank {rank}: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
    if heard != world:
        print(f"rank {rank}: heard {heard} of {world} ranks", file=sys.stderr)
        return 1
    if slow:
        print(f"rank {rank} on {socket.gethostname()}: {device} {slow} (check: speed)", file=sys.stderr)
    return int(bool(slow) and ANY_SPEED not in sys.argv)


def _of_all_ranks(number: float, device: torch.device) -> list[float]:
    """A number of each rank."""
    own = torch.tensor([number], dtype=torch.float32, device=device)
    found = [torch.empty_like(own) for _ in range(distributed.get_world_size())]
    distributed.all_gather(found, own)
    return [float(one) for one in found]


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # after an error the threads of the other backend may never end
