"""A rank that only looks whether all ranks can talk: joins the group, adds one to a sum, and leaves.

What fails here in seconds would fail in training after the whole model has been built.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta

import torch
from torch import distributed

TIMEOUT = timedelta(seconds=300)
"""Hundreds of ranks import torch from one file system that none of them has read yet: that takes minutes."""


def main() -> int:
    """Returns the exit status: 0 when every rank was heard."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    device = torch.device("cpu") if accelerator is None else torch.device(accelerator, int(os.environ["LOCAL_RANK"]))
    if accelerator is not None:
        torch.accelerator.set_device_index(device.index)
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
