"""Bitwise reproducible training on a GPU: kernels that add in a fixed order, which are slower.

torch uses the deterministic kernel where it has one: for the query gradients of flash attention, and for indexed sums
such as the gradients of the embedding and of T5's bias. Where it has none it raises an error. Inductor chooses kernels
without timing them, because timings could choose differently at every start.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

import torch

from bst_base.settings import ConfigError

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
FIXED = (":4096:8", ":16:8")
"""Workspace settings that make cuBLAS deterministic (its manual, section 2.1.4)."""


def make_deterministic(environ: MutableMapping[str, str] = os.environ) -> None:
    """Make this process deterministic; call it before the first matrix product, when cuBLAS reads the variable.

    Raises ConfigError when the environment sets a workspace that is not deterministic.
    """
    asked = environ.setdefault(WORKSPACE, FIXED[0])
    if asked not in FIXED:
        raise ConfigError(
            f"deterministic: true needs {WORKSPACE}={FIXED[0]} or {FIXED[1]}, and the environment has {asked!r}: "
            "unset it, or set deterministic to false"
        )
    torch.use_deterministic_algorithms(True)
    # torch would also fill every uninitialized buffer with NaN: that costs memory traffic and does not fix any order.
    torch.utils.deterministic.fill_uninitialized_memory = False
