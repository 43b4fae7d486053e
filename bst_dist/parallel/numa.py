"""The cores near a rank's device.

A host with several processors is several NUMA nodes: memory, cores and devices that are near each other. Copies between
a device and the memory of another node are slower, and the host's threads had better run where the copies begin. Linux
says in /sys which node a device and a core belong to; where it does not, nothing is bound.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

SYSTEM = Path("/sys")


def pci_address(properties: Any) -> str | None:
    """Where a device is, as /sys writes it, from what torch knows of it; None where torch does not say."""
    places = [getattr(properties, f"pci_{part}_id", None) for part in ("domain", "bus", "device")]
    if None in places:
        return None
    domain, bus, device = places
    return f"{domain:04x}:{bus:02x}:{device:02x}.0"


def bind_near(pci: str | None, system: Path = SYSTEM) -> int | None:
    """Let all threads of this process run on the cores of a device's node alone; returns the node.

    None, and nothing is changed, where the node is not known, where the process has none of its cores, and where it has
    no others: a launcher's or scheduler's binding is made narrower, never wider.
    """
    if pci is None:
        return None
    try:
        node = int((system / "bus" / "pci" / "devices" / pci / "numa_node").read_text())
        near = cores((system / "devices" / "system" / "node" / f"node{node}" / "cpulist").read_text())
    except (OSError, ValueError):  # no such file; node -1, which means unknown, has none either
        return None
    allowed = os.sched_getaffinity(0)
    if not near & allowed or allowed <= near:
        return None
    for thread in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # it has ended
            os.sched_setaffinity(int(thread.name), near & allowed)
    return node


def cores(text: str) -> set[int]:
    """The numbers in a list of the kernel: ``0-3,8``."""
    found: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found
