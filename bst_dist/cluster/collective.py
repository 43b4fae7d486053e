"""The test rank of the preflight: checks that all ranks compute correctly, communicate, and are equally fast.

It multiplies two matrices, joins the process group, does an all-reduce, compares the time of a matrix product with the
other ranks', and exits. What fails here in seconds would otherwise fail in training after the whole model was built,
and one slow accelerator would slow down all others for the whole run.
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

from bst_base.host import allow_open_files
from bst_dist.faults.status import USER_ERROR
from bst_dist.parallel.devices import cpu_refusal

TIMEOUT = timedelta(seconds=300)
"""Timeout to join. Minutes, because hundreds of ranks may import torch from one file system with cold caches."""
SIZE = 512
"""Rows of the matrices whose product is checked: enough that every multiprocessor computes a part."""
TIMED_SIZE = 8192
"""Rows of the matrices whose product is timed: it takes milliseconds, a kernel launch only microseconds."""
WARM_S = 0.5
"""Seconds that an accelerator multiplies at least: its clock rises from idle in that time."""
SLOW = 1.5
"""A rank is slow above this multiple of the median time; healthy accelerators of one type differ by a tenth."""
ANY_SPEED = "--any-speed"
"""The argument that makes a slow accelerator a message and not a failure."""


def multiplies(device: torch.device) -> bool:
    """Whether the device computes a matrix product correctly; its small integers are exact in every precision."""
    rows = torch.arange(SIZE)
    left, right = (rows[:, None] + rows) % 7, (rows[:, None] * rows) % 5
    found = left.to(device, torch.float32) @ right.to(device, torch.float32)
    return torch.equal(found.cpu().long(), left @ right)


def is_timed(device: torch.device) -> bool:
    """Whether the time of a product is meaningful; on a CPU it is not, because ranks share its cores."""
    return device.type != "cpu"


def seconds_of_product(device: torch.device, size: int = TIMED_SIZE, warm_s: float = WARM_S) -> float:
    """Return the time of the fastest of several bf16 matrix products."""
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
    """Return a message if `rank` is slow, from the times of all ranks; else None."""
    times = seconds[rank] / statistics.median(seconds)
    if times <= SLOW:
        return None
    return (
        f"takes {times:.1f} times as long as the median rank for a matrix product: is another program using it, "
        "or is it throttled by heat or a power limit?"
    )


def _say(text: str) -> None:
    print(f"rank {os.environ['RANK']} on {socket.gethostname()}: {text}", file=sys.stderr)


def main() -> int:
    """Run the checks; return the exit status: 0 when every rank took part and none is slow."""
    allow_open_files()  # rank 0 holds a connection of every rank
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    device = torch.device("cpu") if accelerator is None else torch.device(accelerator, int(os.environ["LOCAL_RANK"]))
    if accelerator is not None:
        torch.accelerator.set_device_index(device.index)
    if accelerator is None and (refusal := cpu_refusal(os.environ)) is not None:
        _say(refusal)
        return USER_ERROR
    if not multiplies(device):
        _say(f"{device} computes a wrong matrix product (check: sum)")
        return 1
    try:
        distributed.init_process_group(timeout=TIMEOUT, device_id=None if accelerator is None else device)
        total = torch.ones(1, device=device)
        distributed.all_reduce(total)
        heard = int(total.item())
        slow = slowness(_of_all_ranks(seconds_of_product(device), device), rank) if is_timed(device) else None
        distributed.destroy_process_group()
    except (RuntimeError, ValueError) as error:
        _say(f"{str(error).splitlines()[0]} (check: sum)")
        return 1
    if heard != world:
        _say(
            f"the sum over all ranks counted {heard} of {world} ranks: is the network between them sound? (check: sum)"
        )
        return 1
    if slow:
        _say(f"{device} {slow} (check: speed)")
    return int(bool(slow) and ANY_SPEED not in sys.argv)


def _of_all_ranks(number: float, device: torch.device) -> list[float]:
    """Return the numbers of all ranks."""
    own = torch.tensor([number], dtype=torch.float32, device=device)
    found = [torch.empty_like(own) for _ in range(distributed.get_world_size())]
    distributed.all_gather(found, own)
    return [float(one) for one in found]


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # not sys.exit: after an error, threads of the communication backend may never end
