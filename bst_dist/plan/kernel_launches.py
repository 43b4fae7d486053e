"""The time in which the host launches a step's kernels: a lower bound of the step time, however small the model.

Operations are counted by running the layers on fake tensors (`LiveBytes.launched`), so the counts follow the code.
"""

from __future__ import annotations

from collections.abc import Sequence

from bst_dist.activation.config import ActivationCheckpointingConfig
from bst_dist.plan.memory.activations import Activations
from bst_dist.plan.memory.peak import Work

LAUNCH_S = 6e-6
"""Host time for one operation: Python, autograd and the driver's launch. Assumed, not measured on a GPU."""
COMPILED_FEWER = 4
"""Factor by which a compiled layer has fewer launches. Assumed: the small SH layer of docs/gpu.md has 85 launches when
compiled by Inductor, but their time was not measured."""


def operations(activations: Activations, mixers: Sequence[str], work: Work) -> tuple[int, int]:
    """Return the operations of one micro-batch, forward and backward: in the layers, and in head and loss."""
    layers = 0
    for mixer, again in zip(mixers, work.rerun(), strict=True):
        checkpointing = work.checkpointing if again else ActivationCheckpointingConfig()
        layers += activations.layer(mixer, checkpointing, work.slice, work.strategy.stage == 3, work.compiled).launches
    return layers, activations.head(work.slice).launches


def host_seconds(activations: Activations, mixers: Sequence[str], work: Work) -> float:
    """Return the launch time of one step in seconds, without the few launches of the optimizer."""
    layers, around = operations(activations, mixers, work)
    return LAUNCH_S * work.accumulation * (layers / (COMPILED_FEWER if work.compiled else 1) + around)
