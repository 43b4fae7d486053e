"""A rank is bound to the CPU cores near its device, according to /sys; tested with a fake /sys."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from bst_dist.parallel.numa import cores, pci_address

DEVICE = "0000:3b:00.0"
PROGRAM = """
import os, sys, threading
from pathlib import Path
from bst_dist.parallel.numa import bind_to_device_node
done = threading.Event()
other = threading.Thread(target=done.wait)
other.start()
node = bind_to_device_node(sys.argv[1], Path(sys.argv[2]))
print(node, sorted(os.sched_getaffinity(0)), sorted(os.sched_getaffinity(other.native_id)))
done.set()
"""


@pytest.fixture
def system(tmp_path: Path):
    """``system(node, cpulist)`` makes a /sys in which the device belongs to a NUMA node with these cores."""

    def make(node: int, cpulist: str) -> Path:
        device, near = tmp_path / "bus/pci/devices" / DEVICE, tmp_path / "devices/system/node/node1"
        device.mkdir(parents=True)
        near.mkdir(parents=True)
        (device / "numa_node").write_text(f"{node}\n")
        (near / "cpulist").write_text(f"{cpulist}\n")
        return tmp_path

    return make


def bound(system: Path, device: str = DEVICE) -> str:
    """Let a process bind itself; return its node, its cores, and the cores of its other thread."""
    ran = subprocess.run([sys.executable, "-c", PROGRAM, device, str(system)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


def test_all_threads_run_on_the_cores_of_the_device_node(system):
    own = sorted(os.sched_getaffinity(0))
    if len(own) < 2:
        pytest.skip("this process has one core alone")
    assert bound(system(1, f"{own[-1]},900-903")) == f"1 {own[-1:]} {own[-1:]}"


@pytest.mark.parametrize(
    ("node", "cpulist", "device"),
    [
        (-1, "0", DEVICE),  # the kernel does not know
        (1, "900-903", DEVICE),  # a scheduler gave the process other cores
        (1, "0-1023", DEVICE),  # one node has all cores
        (1, "0", "0000:ff:00.0"),  # a device that does not exist
        (1, "zero", DEVICE),
    ],
)
def test_without_numa_information_nothing_is_bound(system, node, cpulist, device):
    own = sorted(os.sched_getaffinity(0))
    assert bound(system(node, cpulist), device) == f"None {own} {own}"


def test_the_pci_address_of_a_device_has_the_kernel_format():
    assert pci_address(SimpleNamespace(pci_domain_id=0, pci_bus_id=0x3B, pci_device_id=0)) == DEVICE
    assert pci_address(SimpleNamespace(name="a device that torch says less of")) is None


def test_lists_of_cores_are_parsed():
    assert cores("0-3,8\n") == {0, 1, 2, 3, 8}
    assert cores("\n") == set()
