"""Random generators: seeded from the recipe, captured into a checkpoint, restored from it; each rank has its own."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def seed_all(seed: int, rank: int, step: int = 0) -> None:
    """Seed every generator of this process; ranks and steps differ, so that what they draw is independent."""
    words = np.random.SeedSequence([seed, rank, step]).generate_state(3, np.uint64)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]) % 2**32)
    torch.manual_seed(int(words[2]) % 2**63)


def capture(device: torch.device) -> dict[str, Any]:
    """The state of every generator of this process, in types that torch loads without running code."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    state = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    return state if device.type == "cpu" else state | {"device": torch.get_device_module(device).get_rng_state(device)}


def restore(state: dict[str, Any], device: torch.device) -> None:
    """Put every generator back to where `capture` found it."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "device" in state:
        torch.get_device_module(device).set_rng_state(state["device"], device)
