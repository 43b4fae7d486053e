"""A rank that only looks whether all ranks compute and talk: multiplies, joins the group, adds to a sum, and leaves.

What fails here in seconds would fail in training after the whole model has been built.
"""

from __future__ import annotations

import os
import socket
import sys
from datetime import timedelta

import torch
from torch import distributed

from bst_dist.faults.status import USER_ERROR
from bst_dist.parallel.devices import cpu_refusal

TIMEOUT = timedelta(seconds=300)
"""Hundreds of ranks import torch from one file system that none of them has read yet: that takes minutes."""
SIZE = 512
"""Rows of the matrices: enough for every multiprocessor to have a part of them."""


def multiplies(device: torch.device) -> bool:
    """Whether the device gets a product of two matrices right: of small whole numbers, exact in every precision."""
    rows = torch.arange(SIZE)
    left, right = (rows[:, None] + rows) % 7, (rows[:, None] * rows) % 5
    found = left.to(device, torch.float32) @ right.to(device, torch.float32)
    return torch.equal(found.cpu().long(), left @ right)


def main() -> int:
    """Returns the exit status: 0 when every rank was heard."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    device = torch.device("cpu") if accelerator is None else torch.device(accelerator, int(os.environ["LOCAL_RANK"]))
    if accelerator is not None:
        torch.accelerator.set_device_index(device.index)
    if accelerator is None and (refusal := cpu_refusal(os.environ)) is not None:
        print(f"rank {rank} on {socket.gethostname()}: {refusal}", file=sys.stderr)
        return USER_ERROR
    if not multiplies(device):
        print(f"rank {rank} on {socket.gethostname()}: {device} multiplies two matrices wrongly", file=sys.stderr)
        return 1
    try:
        distributed.init_process_group(timeout=TIMEOUT, device_id=None if accelerator is None else device)
        total = torch.ones(1, device=device)
        distributed.all_reduce(total)
        heard = int(total.item())
        distributed.destroy_process_group()
    except (RuntimeError, ValueError) as error:
        print(f"rank {rank}: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
    if heard != world:
        print(f"rank {rank}: heard {heard} of {world} ranks", file=sys.stderr)
    return int(heard != world)


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # after an error the threads of the other backend may never end
