"""How long a step takes: a roofline with stated efficiencies, fitted to one H200 (docs/plan.md says which of them).

Matrix products and attention run at a fraction of the peak, the SSM in single precision at a fraction of its own, all
that is kept between the passes goes to memory and back a few times, and so does what the head and the loss make. What
DeepSpeed reduces or gathers while the backward pass runs costs only what outlasts that pass; everything else that is
sent is waited for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from bst_dist.activation.config import ActivationCheckpointingConfig
from bst_dist.plan.accelerators import Accelerator
from bst_dist.plan.memory.peak import Work
from bst_dist.plan.traffic import GATHER, MOMENTUM

SINGLE_EFFICIENCY = 0.3
"""Of the single-precision peak, that the SSM's small batched products reach."""
MEMORY_EFFICIENCY = 0.8
LINK_EFFICIENCY = 0.8
"""Of a link's rate, that large messages reach."""
ACTIVATION_PASSES = 4
"""Times that a byte made for the backward pass is written or read: made, read once more forward, twice backward."""
UPDATE_BYTES = 44
"""Of a parameter of a rank's share in the update: gradient, moments, copy and weight, read and written."""
HOST_GBS = 25.0
"""To the host's memory and back, 10^9 bytes per second: PCIe 4 x16 or better."""
SELECTIVE_RERUN = 0.5
"""Of a layer's forward pass, what the selective policy computes again: the wide products of its feed-forward network
and what is not a product."""
LATENCY_S = 20e-6
"""Of one message between ranks of a sequence."""
ATTENTION = ("attention", "cross")
"""Terms that attention's kernels compute."""
SINGLE_PRECISION = ("ssm", "fft")
"""Terms that are not computed in bfloat16."""


@dataclass(frozen=True)
class Cluster:
    """Equal nodes of equal devices."""

    nodes: int
    per_node: int
    accelerator: Accelerator
    slower: float = 1.0
    """Times as long as the model of time says, that a step takes here; a run has measured it (`plan/measured.py`)."""

    @property
    def world(self) -> int:
        """Ranks."""
        return self.nodes * self.per_node

    def split(self, sent: float) -> tuple[float, float]:
        """What a rank sends in collectives of all ranks: inside its node, and to another one. Rings go through every
        device of a node before they leave it, each by another device's network port."""
        if self.nodes == 1:
            return sent, 0.0
        return sent * (self.per_node - 1) / self.per_node, sent / self.per_node

    def seconds(self, inside: float, between: float) -> float:
        """For bytes that go over both kinds of link at once."""
        rates = (self.accelerator.in_node_gbs, self.accelerator.between_nodes_gbs)
        return max(sent / (rate * 1e9 * LINK_EFFICIENCY) for sent, rate in zip((inside, between), rates, strict=True))


@dataclass(frozen=True)
class Speed:
    """Seconds of one step, by what they go to."""

    compute: float
    rerun: float
    """Running layers again, under activation checkpointing and for the edges of slices."""
    memory: float
    """Beyond the arithmetic: activations to memory and back, and the update."""
    exposed: float
    """Waiting for gradients and weights that did not hide behind the backward pass."""
    sequence: float
    """Waiting for messages between the ranks of a sequence."""
    offload: float
    """Waiting for activations from the host's memory."""
    launches: float
    """Waiting for the host, which launches kernels more slowly than small layers compute."""
    muon: float
    """Orthogonalising Muon's momentum, on the rank that has most of it."""
    flops: float
    """Of the model, of all ranks in a step: forward and backward, without rerunning."""

    @property
    def total(self) -> float:
        """Of the step."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        """Seconds by name."""
        return {name: value for name, value in vars(self).items() if name != "flops"}

    def times(self, factor: float) -> Speed:
        """All seconds times a factor."""
        return replace(self, **{name: factor * value for name, value in self.parts().items()})


@dataclass(frozen=True)
class Moved:
    """What a rank moves to and from memory, and launches."""

    activations: int
    """Bytes that one micro-batch makes for its backward pass, were nothing run again."""
    around: int
    """Bytes that one micro-batch reads and writes around its layers, in the head and the loss."""
    host: int
    """Bytes of one micro-batch that go to the host's memory and back."""
    updated: float
    """Parameters that the rank updates."""
    host_s: float = 0.0
    """Seconds in which the host launches a step's kernels."""
    orthogonalising: float = 0.0
    """FLOPs of the rank that orthogonalises most."""


def speed(flops: dict[str, float], work: Work, moved: Moved, traffic: dict[str, float], between: dict[str, int],
          cluster: Cluster, bf16: bool) -> Speed:  # fmt: skip
    """Of one step.

    Args:
        flops: of a token's forward pass, by term.
        traffic: bytes of gradients and weights that a rank sends in a step.
        between: the same for messages between the ranks of a sequence.
    """
    device, part = cluster.accelerator, work.slice
    tokens = part.rows * part.length * work.accumulation
    forward, layers_only = _forward_seconds(flops, tokens, device, bf16)
    again = share_rerun(work.checkpointing, work.depth) + work.edge_passes / work.accumulation
    rerun = layers_only * again
    passes = ACTIVATION_PASSES + again
    to_memory = (passes * moved.activations + moved.around) * work.accumulation + UPDATE_BYTES * moved.updated
    hidden = 2 * forward + rerun if work.strategy.overlap_comm else 0.0
    waits = {kind: cluster.seconds(*cluster.split(sent)) for kind, sent in traffic.items()}
    late = sum(waits.values())
    if work.strategy.overlap_comm:
        after = (MOMENTUM,) if work.strategy.stage == 3 else (MOMENTUM, GATHER)  # in the update, behind nothing
        hideable = late - sum(waits.get(kind, 0.0) for kind in after)
        late = max(hideable - hidden, 0.0) + late - hideable
    memory = to_memory / (device.memory_gbs * 1e9 * MEMORY_EFFICIENCY)
    return Speed(
        compute=3 * forward,
        rerun=rerun,
        memory=memory,
        exposed=late,
        sequence=_sequence_seconds(between, work, cluster),
        offload=max(0.0, 2 * moved.host * work.accumulation / (HOST_GBS * 1e9) - 2 * forward - rerun),
        launches=max(0.0, moved.host_s - 3 * forward - rerun - memory),
        muon=moved.orthogonalising / (1e12 * device.bf16_tflops * device.products),
        flops=3 * sum(flops.values()) * tokens * cluster.world,
    ).times(cluster.slower)


def share_rerun(checkpointing: ActivationCheckpointingConfig, depth: int) -> float:
    """Of the layers' forward pass, what is computed again in the backward pass."""
    again = sum(checkpointing.runs_again(index) for index in range(depth)) / depth
    return again * (SELECTIVE_RERUN if checkpointing.policy == "selective" else 1.0)


def _forward_seconds(flops: dict[str, float], tokens: int, device: Accelerator, bf16: bool) -> tuple[float, float]:
    """Of one rank's forward passes in a step; and of the layers alone."""
    peak = 1e12 * (device.bf16_tflops if bf16 else device.fp32_tflops)
    rates = dict.fromkeys(ATTENTION, peak * device.attention)
    rates |= dict.fromkeys(SINGLE_PRECISION, 1e12 * device.fp32_tflops * SINGLE_EFFICIENCY)
    seconds = {term: tokens * count / rates.get(term, peak * device.products) for term, count in flops.items()}
    return sum(seconds.values()), sum(seconds.values()) - seconds["head"]


def _sequence_seconds(between: dict[str, int], work: Work, cluster: Cluster) -> float:
    """The rank that waits longest has its neighbour on another node, when a sequence lies on several."""
    if not between:
        return 0.0
    spans = work.slice.sp > cluster.per_node
    device = cluster.accelerator
    rate = (device.between_nodes_gbs if spans else device.in_node_gbs) * 1e9 * LINK_EFFICIENCY
    messages = len(between) * work.depth * (work.accumulation + work.edge_passes)
    return sum(between.values()) / rate + messages * LATENCY_S
