"""Check that ranks on this machine can communicate: an all-reduce over two ranks, as in `bst launch`'s preflight."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator

from bst_base.host import free_port
from bst_dist.tools.doctor.finding import Finding, ask_python, broken, good

LIMIT_S = 75.0
RANKS = 2
_COUNT = "import torch; print(torch.accelerator.device_count() if torch.accelerator.is_available() else 0)"
_HIDDEN = dict.fromkeys(("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ZE_AFFINITY_MASK"), "")


def collective() -> Iterator[Finding]:
    """Run the collective over gloo on the CPU, and over the accelerators if there are any."""
    yield _sum(RANKS, "on the CPU", _HIDDEN)
    if devices := ask_python(_COUNT):
        yield _sum(min(RANKS, devices), "on the accelerators", {})


def _sum(count: int, where: str, environment: dict[str, str]) -> Finding:
    from bst_dist.cluster.processes import HostRanks, LocalRanks

    share = HostRanks(0, count, count, "127.0.0.1", free_port())
    started = time.monotonic()
    command = [sys.executable, "-m", "bst_dist.cluster.collective"]
    ranks = LocalRanks(command, share, {**os.environ, **environment}, piped=True)
    try:
        while ranks.running and time.monotonic() - started < LIMIT_S:
            time.sleep(0.05)
        statuses = ranks.poll()
    finally:
        ranks.kill()
    seconds = time.monotonic() - started
    if len(statuses) == count and not any(statuses.values()):
        return good(f"a sum over {count} ranks {where}, in {seconds:.1f} s with their start")
    if len(statuses) < count:
        text = f"a sum over {count} ranks {where} did not finish within {LIMIT_S:.0f} s"
        return broken(text, "does a firewall block the loopback? NCCL_DEBUG=INFO and GLOO_SOCKET_IFNAME=lo tell more")
    said = [
        pipe.read().decode(errors="replace").strip()
        for process in ranks.processes.values()
        for pipe in (process.stderr, process.stdout)
    ]
    why = next((text.splitlines()[-1] for text in said if text), f"statuses {statuses}")
    return broken(f"a sum over {count} ranks {where} failed: {why}")
