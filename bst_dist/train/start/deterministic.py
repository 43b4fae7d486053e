"""Equal bits from equal runs on a GPU: kernels that add in a fixed order, at a price in speed.

Where torch has both, it takes the fixed order: the query gradients of flash attention, indexed sums such as the
gradients of the embedding and of T5's bias. Where it has none it raises an error, so that nothing passes for what it is
not. Inductor then chooses kernels without timing them, which would choose differently from start to start.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

import torch

from bst_base.settings import ConfigError

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
FIXED = (":4096:8", ":16:8")
"""Workspaces with which cuBLAS computes the same bits every time (its manual, section 2.1.4)."""


def make_deterministic(environ: MutableMapping[str, str] = os.environ) -> None:
    """From now on, in this process; called before the first matrix product, when cuBLAS reads its workspace.

    Raises ConfigError where the environment asks cuBLAS for what is not deterministic.
    """
    asked = environ.setdefault(WORKSPACE, FIXED[0])
    if asked not in FIXED:
        raise ConfigError(
            f"deterministic: true needs {WORKSPACE}={FIXED[0]} or {FIXED[1]}, and the environment has {asked!r}: "
            "unset it, or set deterministic to false"
        )
    torch.use_deterministic_algorithms(True)
    # It would write NaN into every buffer that is made without values: traffic, and no help to an order of sums.
    torch.utils.deterministic.fill_uninitialized_memory = False
