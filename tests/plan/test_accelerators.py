"""Accelerators found by the device names of drivers."""

import pytest

from bst_dist.plan.accelerators import accelerators, of_device


@pytest.mark.parametrize(
    ("driver", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-80gb"),
        ("NVIDIA H100 PCIe", "h100-pcie-80gb"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A10", "a10-24gb"),
        ("NVIDIA L40S", "l40s-48gb"),
        ("NVIDIA L4", "l4-24gb"),
        ("AMD Instinct MI300X", "mi300x-192gb"),
    ],
)
def test_device_is_found_by_its_driver_name(driver, name):
    assert of_device(driver) == accelerators()[name]


def test_unknown_device_gives_none():
    assert of_device("Quadro 600") is None
