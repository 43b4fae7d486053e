"""The random generators of each rank: seeded from the recipe, saved in checkpoints, and restored from them."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def seed_all(seed: int, rank: int, step: int = 0) -> None:
    """Seed every generator of this process, differently for each rank and step so that the numbers are independent."""
    words = np.random.SeedSequence([seed, rank, step]).generate_state(3, np.uint64)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]) % 2**32)
    torch.manual_seed(int(words[2]) % 2**63)


def capture(device: torch.device) -> dict[str, Any]:
    """Return the state of every generator of this process, in types that torch loads with weights_only."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    state = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    return state if device.type == "cpu" else state | {"device": torch.get_device_module(device).get_rng_state(device)}


def restore(state: dict[str, Any], device: torch.device) -> None:
    """Set every generator to a state returned by `capture`; on a CPU, that of another device is left out."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "device" in state and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(state["device"], device)
