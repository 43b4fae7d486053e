"""Accelerators and their links: the figures that a plan uses, from accelerators.yaml and a file of the user's."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import yaml
from pydantic import Field

from bst_base.errors import UserError, nearest
from bst_base.settings import Config, ConfigError, parse

FILE = Path(__file__).with_name("accelerators.yaml")


VENDORS = ("NVIDIA", "AMD", "INSTINCT")
"""First words of device names that say nothing about the model."""
FORMS = {"SXM", "SXM2", "SXM4", "SXM5", "SXM6", "PCIE", "OAM", "HBM2", "HBM2E", "HBM3", "HBM3E"}
"""Words of device names that say only in which form a model comes. The peak of a model with any other word differs, or
is not known: L40S and L40, H100 NVL, a part of a device (MIG), a virtual one."""


class UnknownAcceleratorError(UserError):
    """The name of an accelerator is in no file."""


class Accelerator(Config):
    """One type of device; rates are per device and direction."""

    title: str
    """Full name."""
    device: str = ""
    """Model in the device name that the driver reports, such as H100 or H100 PCIe; empty: never matched by that name.
    The driver may add its vendor, a form (SXM4, PCIe, HBM3) and this memory, but no other words."""
    memory_gb: float = Field(gt=0)
    """Memory in 10^9 bytes."""
    bf16_tflops: float = Field(gt=0)
    """Dense peak of matrix products in bfloat16, in TFLOP/s."""
    fp32_tflops: float = Field(gt=0)
    """Peak in fp32 without tensor cores, in TFLOP/s."""
    memory_gbs: float = Field(gt=0)
    """Bandwidth of its memory, 10^9 bytes per second."""
    in_node_gbs: float = Field(gt=0)
    """Bandwidth between two devices of a node, 10^9 bytes per second."""
    between_nodes_gbs: float = Field(gt=0)
    """Bandwidth to another node, the device's share of the node's network, 10^9 bytes per second."""
    source: str = Field(min_length=1)
    """Source of the figures."""
    products: float = Field(0.5, gt=0, le=1)
    """Share of the peak that matrix products reach in training."""
    attention: float = Field(0.5, gt=0, le=1)
    """Share of the peak that attention kernels reach, relative to the FLOPs counted for them."""
    shares: str = "assumed; measured on no such device"
    """Source of the two shares `products` and `attention`."""

    def peak_flops(self, bf16: bool) -> float:
        """Peak FLOP/s of matrix products in bfloat16, or in fp32."""
        return 1e12 * (self.bf16_tflops if bf16 else self.fp32_tflops)

    def is_called(self, driver: str) -> bool:
        """Whether the driver's device name names this model."""
        own, found = _words(self.device), _words(driver)
        forms = FORMS | {f"{self.memory_gb:g}GB"}
        return bool(own) and own[:1] == found[:1] and set(own) <= set(found) <= set(own) | forms


def accelerators(own: Path | None = None) -> dict[str, Accelerator]:
    """Return all accelerators by name. Entries of the user's file `own` come first and override shipped ones.

    Raise ConfigError, naming the file, the device and the field, for an invalid entry.
    """
    added = _read(own) if own else {}
    return added | {name: found for name, found in _shipped().items() if name not in added}


def accelerator(name: str, own: Path | None = None) -> Accelerator:
    """Return the accelerator of that name. Raise UnknownAcceleratorError, with the nearest name, if there is none."""
    known = accelerators(own)
    if name in known:
        return known[name]
    near = nearest(name.lower(), known, cutoff=0.4)
    hint = f"did you mean {near}? " if near else ""
    raise UnknownAcceleratorError(
        f"--gpu {name}: not known; {hint}There are {', '.join(known)}; add your own with --accelerators FILE"
    )


def of_device(name: str) -> Accelerator | None:
    """Return the accelerator for a device name reported by the driver, or None. The longest match counts."""
    matching = [shipped for shipped in _shipped().values() if shipped.is_called(name)]
    return max(matching, key=lambda shipped: len(_words(shipped.device)), default=None)


def _words(name: str) -> list[str]:
    """Return the words of a device name in capitals, without the vendor in front."""
    words = re.split(r"[\s-]+", name.strip().upper())
    while words[0] in VENDORS and len(words) > 1:
        words = words[1:]
    return words if words[0] else []


@cache
def _shipped() -> dict[str, Accelerator]:
    return _read(FILE)


def _read(path: Path) -> dict[str, Accelerator]:
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; {FILE} is an example") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {error}") from None
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise ConfigError(f"{path}: expected devices, each a name and its fields, as in {FILE}")
    return {str(name): parse(Accelerator, entry, f"{path}: {name}") for name, entry in entries.items()}
