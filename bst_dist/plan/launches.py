"""How long the host takes to launch a step's kernels: no step is shorter, however small the model.

Operations are counted in the layers themselves, on fake tensors (`LiveBytes.launched`), so that they follow the code.
"""

from __future__ import annotations

from collections.abc import Sequence

from bst_dist.activation.config import ActivationCheckpointingConfig
from bst_dist.plan.memory.activations import Activations
from bst_dist.plan.memory.peak import Work

LAUNCH_S = 6e-6
"""Of the host, for one operation: Python, autograd and the driver's launch. Assumed, and measured on no GPU."""
COMPILED_FEWER = 4
"""Times fewer launches of a compiled layer. Assumed: the small SH layer that docs/gpu.md counts has 85 launches when
Inductor has compiled it, but nobody has timed them."""


def operations(activations: Activations, mixers: Sequence[str], work: Work) -> tuple[int, int]:
    """Of one micro-batch, forward and backward: in the layers, and in what stands around them."""
    layers = 0
    for mixer, again in zip(mixers, work.rerun(), strict=True):
        checkpointing = work.checkpointing if again else ActivationCheckpointingConfig()
        layers += activations.layer(mixer, checkpointing, work.slice, work.strategy.stage == 3, work.compiled).launches
    return layers, activations.head(work.slice).launches


def host_seconds(activations: Activations, mixers: Sequence[str], work: Work) -> float:
    """Of one step; the optimizer's few launches are left out."""
    layers, around = operations(activations, mixers, work)
    return LAUNCH_S * work.accumulation * (layers / (COMPILED_FEWER if work.compiled else 1) + around)
