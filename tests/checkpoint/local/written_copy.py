"""A local copy of two values of three kinds, and a disk without space."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import torch

from bst_dist.checkpoint.fragments import MOMENTS, WEIGHT
from bst_dist.checkpoint.host_copy import Copied
from bst_dist.checkpoint.layout import Layout
from bst_dist.checkpoint.local.file import write_copy
from bst_dist.checkpoint.shards import Piece


def write(path: Path) -> dict[str, Any]:
    values = {kind: torch.arange(5.0) + place for place, kind in enumerate((WEIGHT, *MOMENTS))}
    copied = [Copied(Piece("a", (10,), 5, 5), kind, [value[:2], value[2:]]) for kind, value in values.items()]
    own = {"rng": {"torch": torch.get_rng_state()}, "carried": []}
    write_copy(path, copied, own, {"step": 7, "layout": vars(Layout(2, 1, 1))})
    return own


def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device", "/dev/shm/x")
