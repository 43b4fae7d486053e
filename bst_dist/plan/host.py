"""Host memory per GPU that a plan takes beside the GPU's own memory."""

from __future__ import annotations

from bst_dist.checkpoint.config import LOCAL_COPIES_KEPT
from bst_dist.plan.memory.zero import WORD
from bst_dist.plan.search import Candidate, Planner


def host_memory(planner: Planner, best: Candidate) -> dict[str, float]:
    """Bytes of host memory per GPU, by what they hold.

    activations: the layers' inputs under the policy `offload`, and the edges of slices that wait in host memory.
    checkpoint copy: pinned memory that a background checkpoint is written from.
    local copies: the pinned copy that they are written from, and the files in /dev/shm. With several nodes, a node also
    keeps the files of a rank of another node.
    """
    cluster, checkpoint = planner.cluster, planner.recipe.checkpoint
    replicated = best.work.strategy.stage == 0
    state = best.memory.optimizer + (best.memory.weights if replicated else 0)
    copied = state / cluster.world if replicated else state
    files = LOCAL_COPIES_KEPT * (2 if cluster.nodes > 1 else 1)
    return {
        "activations": best.memory.host,
        "checkpoint copy": copied if checkpoint.background else 0,
        "local copies": state * (1 + files) if checkpoint.local_every else 0,
    }


def host_at_start(planner: Planner) -> float:
    """Bytes of host memory per GPU that a start takes before any step; `host_memory` is taken later.

    Every rank builds the whole model there, in every ZeRO stage, before DeepSpeed moves or shards it.
    """
    return WORD * planner.sizes.total
