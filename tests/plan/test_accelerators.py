"""Accelerators found by the device names of drivers."""

import pytest

from bst_dist.plan.accelerators import accelerators, of_device

NAMES = {
    "NVIDIA H100 80GB HBM3": "h100-80gb",
    "NVIDIA H100 PCIe": "h100-pcie-80gb",
    "NVIDIA H100 NVL": "h100-nvl-94gb",
    "NVIDIA H100 80GB HBM3 MIG 1g.10gb": None,
    "NVIDIA H800": None,
    "NVIDIA GH200 480GB": "gh200-96gb",
    "NVIDIA H200": "h200-141gb",
    "NVIDIA H200 NVL": "h200-nvl-141gb",
    "NVIDIA H20": None,
    "NVIDIA B200": "b200-180gb",
    "NVIDIA GB200": None,
    "NVIDIA GB300": None,
    "A100-SXM4-40GB": "a100-40gb",
    "NVIDIA A100-SXM4-40GB": "a100-40gb",
    "NVIDIA A100-PCIE-40GB": "a100-40gb",
    "NVIDIA A100-SXM4-80GB": "a100-80gb",
    "NVIDIA A100 80GB PCIe": "a100-80gb",
    "NVIDIA A100-SXM-64GB": None,
    "NVIDIA A100X": None,
    "NVIDIA A10": "a10-24gb",
    "NVIDIA A10G": None,
    "NVIDIA A10-24Q": None,
    "NVIDIA L40": "l40-48gb",
    "NVIDIA L40S": "l40s-48gb",
    "NVIDIA L4": "l4-24gb",
    "AMD Instinct MI300X": "mi300x-192gb",
    "AMD Instinct MI300X OAM": "mi300x-192gb",
    "AMD Instinct MI300A": None,
    "AMD Instinct MI250X": "mi250x-64gb",
    "AMD Instinct MI250X / MI250": None,
    "Quadro 600": None,
    "NVIDIA": None,
    "": None,
}
"""Names that drivers report, and the entry with the figures of the data sheet; None: the peak is measured."""


@pytest.mark.parametrize("driver", NAMES)
def test_device_is_found_by_the_whole_name_of_its_model(driver):
    found = {name: one for name, one in accelerators().items() if one == of_device(driver)}
    assert list(found) == ([NAMES[driver]] if NAMES[driver] else [])


def test_every_entry_is_found_by_some_name():
    assert set(accelerators()) == set(filter(None, NAMES.values()))
