"""Accelerators and what connects them: the figures a plan rests on, from a file that users may add to."""

from __future__ import annotations

import difflib
from functools import cache
from pathlib import Path

import yaml
from pydantic import Field

from bst_base.errors import UserError
from bst_base.settings import Config, ConfigError, parse

FILE = Path(__file__).with_name("accelerators.yaml")


class UnknownAcceleratorError(UserError):
    """A name that no file has."""


class Accelerator(Config):
    """One device; rates are per device and direction."""

    title: str
    """What it is called in full."""
    device: str = ""
    """Part of the name by which the driver calls it; empty: it is never looked for by that name."""
    memory_gb: float = Field(gt=0)
    """Memory in 10^9 bytes."""
    bf16_tflops: float = Field(gt=0)
    """Dense peak of matrix products in bfloat16, 10^12 per second."""
    fp32_tflops: float = Field(gt=0)
    """Peak in single precision, outside of tensor cores."""
    memory_gbs: float = Field(gt=0)
    """To and from its memory, 10^9 bytes per second."""
    in_node_gbs: float = Field(gt=0)
    """Between two devices of a node."""
    between_nodes_gbs: float = Field(gt=0)
    """To another node: the device's share of the node's network."""
    source: str = Field(min_length=1)
    """Where the figures are from."""
    products: float = Field(0.5, gt=0, le=1)
    """Share of the peak that matrix products reach in training."""
    attention: float = Field(0.5, gt=0, le=1)
    """The same for attention's kernels, of the FLOPs that are counted for them."""
    shares: str = "assumed; measured on no such device"
    """Where the two shares are from."""


def accelerators(own: Path | None = None) -> dict[str, Accelerator]:
    """By name; those of the user's own file first. Raises ConfigError naming the file, the device and the field."""
    added = _read(own) if own else {}
    return added | {name: found for name, found in _shipped().items() if name not in added}


def accelerator(name: str, own: Path | None = None) -> Accelerator:
    """The one of that name; raises UnknownAcceleratorError with the nearest name."""
    known = accelerators(own)
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UnknownAcceleratorError(
        f"--gpu {name}: not known; {hint}There are {', '.join(known)}; add your own with --accelerators FILE"
    )


def of_device(name: str) -> Accelerator | None:
    """The accelerator that a driver calls by this name, if it is known."""
    return next((found for found in _shipped().values() if found.device and found.device in name), None)


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
