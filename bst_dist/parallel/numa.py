"""Binding a process to the CPU cores near its device.

A host with several processors has several NUMA nodes: groups of memory, cores and devices that are near each other.
Copies between a device and the memory of another node are slower, so the threads of a process should run on the node of
its device. Linux gives the node of a device and of a core in /sys. If it does not, nothing is bound.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

SYSTEM = Path("/sys")


def pci_address(properties: Any) -> str | None:
    """Return a device's PCI address as written in /sys, from torch's device properties; None if torch has none."""
    places = [getattr(properties, f"pci_{part}_id", None) for part in ("domain", "bus", "device")]
    if None in places:
        return None
    domain, bus, device = places
    return f"{domain:04x}:{bus:02x}:{device:02x}.0"


def bind_to_device_node(pci: str | None, system: Path = SYSTEM) -> int | None:
    """Bind all threads of this process to the cores of a device's node, and return the node.

    Return None and change nothing if the node is not known, if the process may use none of the node's cores, or if it
    is already bound to them. A binding by a launcher or scheduler is made narrower, never wider.
    """
    if pci is None:
        return None
    try:
        node = int((system / "bus" / "pci" / "devices" / pci / "numa_node").read_text())
        near = cores((system / "devices" / "system" / "node" / f"node{node}" / "cpulist").read_text())
    except (OSError, ValueError):  # no such file; node -1 (unknown) has no cpulist
        return None
    allowed = os.sched_getaffinity(0)
    if not near & allowed or allowed <= near:
        return None
    for thread in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # the thread has ended
            os.sched_setaffinity(int(thread.name), near & allowed)
    return node


def cores(text: str) -> set[int]:
    """Return the numbers in a list as Linux writes it: ``0-3,8``."""
    found: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found
