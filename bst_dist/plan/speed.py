"""Time model of a step: a roofline with stated efficiencies, fitted to one H200 (docs/plan.md says which of them).

Matrix products and attention run at a fraction of the bf16 peak, the SSM at a fraction of the fp32 peak. Activations
kept for the backward pass, and those of head and loss, are written to and read from memory a few times. Communication
that DeepSpeed overlaps with the backward pass (ZeRO-3's gathers: with both passes) costs only the time by which it
outlasts this computation. All other communication adds to the step time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from bst_dist.activation.config import ActivationCheckpointingConfig
from bst_dist.plan.accelerators import Accelerator
from bst_dist.plan.memory.peak import Work
from bst_dist.plan.memory.zero import Strategy
from bst_dist.plan.traffic import GATHER, MOMENTUM

SINGLE_EFFICIENCY = 0.3
"""Share of the fp32 peak that the SSM's small batched products reach."""
MEMORY_EFFICIENCY = 0.8
LINK_EFFICIENCY = 0.8
"""Share of a link's rate that large messages reach."""
ACTIVATION_PASSES = 4
"""Times that a byte kept for the backward pass is written or read: written, read once in forward, twice in backward."""
UPDATE_BYTES = 44
"""Bytes read and written per parameter of a rank's share in the update: gradient, moments, copy and weight."""
HOST_GBS = 25.0
"""Bandwidth between device and host memory, 10^9 bytes per second: PCIe 4 x16 or better."""
SELECTIVE_RERUN = 0.5
"""Share of a layer's forward pass that the selective policy recomputes: the wide products of its feed-forward network,
and everything that is not a product."""
LATENCY_S = 20e-6
"""Latency of one message between the ranks that share a sequence."""
ATTENTION = ("attention", "cross")
"""Terms of the FLOP counts that attention kernels compute."""
SINGLE_PRECISION = ("ssm", "fft", "delta")
"""Terms that are computed in fp32."""


@dataclass(frozen=True)
class Cluster:
    """Equal nodes of equal devices."""

    nodes: int
    per_node: int
    accelerator: Accelerator
    slower: float = 1.0
    """Measured over modelled step time, by which all times are multiplied (`plan/measured.py`)."""

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.nodes * self.per_node

    def split(self, sent: float) -> tuple[float, float]:
        """Split the bytes that a rank sends in collectives of all ranks into those inside its node and to another node.

        Rings go through every device of a node before they leave it, and each ring leaves by another device's network
        port.
        """
        if self.nodes == 1:
            return sent, 0.0
        return sent * (self.per_node - 1) / self.per_node, sent / self.per_node

    def seconds(self, inside: float, between: float) -> float:
        """Return the seconds to send these bytes over both kinds of link at the same time."""
        rates = (self.accelerator.in_node_gbs, self.accelerator.between_nodes_gbs)
        return max(sent / (rate * 1e9 * LINK_EFFICIENCY) for sent, rate in zip((inside, between), rates, strict=True))


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step, by cause."""

    compute: float
    rerun: float
    """Recomputing layers, under activation checkpointing and for the edges of slices."""
    memory: float
    """Memory traffic besides the arithmetic: activations, and the update."""
    exposed: float
    """Communication of gradients and weights that does not overlap with the computation."""
    sequence: float
    """Waiting for messages between the ranks that share a sequence."""
    offload: float
    """Waiting for activations from host memory."""
    launches: float
    """Waiting for the host, if it launches kernels more slowly than the device computes them."""
    muon: float
    """Orthogonalising Muon's momentum, on the rank with the most work."""
    flops: float
    """Model FLOPs of all ranks per step: forward and backward, without recomputation. Not seconds."""

    @property
    def total(self) -> float:
        """Seconds of the whole step."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        """Return the seconds by name."""
        return {name: value for name, value in vars(self).items() if name != "flops"}

    def times(self, factor: float) -> StepTime:
        """Return a copy with all seconds multiplied by a factor."""
        return replace(self, **{name: factor * value for name, value in self.parts().items()})


@dataclass(frozen=True)
class Moved:
    """Memory traffic, launches and Muon's work of one rank."""

    activations: int
    """Bytes that one micro-batch keeps for its backward pass without recomputation."""
    around: int
    """Bytes that one micro-batch reads and writes in the head and the loss."""
    host: int
    """Bytes of one micro-batch that go to host memory and back."""
    updated: float
    """Parameters that the rank updates."""
    host_s: float = 0.0
    """Seconds that the host takes to launch a step's kernels."""
    orthogonalising: float = 0.0
    """FLOPs to orthogonalise momentum, of the rank with most."""


def speed(
    flops: dict[str, float],
    work: Work,
    moved: Moved,
    traffic: dict[str, float],
    between: dict[str, int],
    cluster: Cluster,
    bf16: bool,
) -> StepTime:
    """Return the modelled seconds of one step.

    Args:
        flops: FLOPs of one token's forward pass, by term.
        traffic: bytes of gradients and weights that a rank sends per step.
        between: the same for messages between the ranks that share a sequence.
    """
    device, part = cluster.accelerator, work.slice
    tokens = part.rows * part.length * work.accumulation
    forward, layers_only = _forward_seconds(flops, tokens, device, bf16)
    again = share_rerun(work.checkpointing, work.depth) + work.edge_passes / work.accumulation
    rerun = layers_only * again
    passes = ACTIVATION_PASSES + again
    to_memory = (passes * moved.activations + moved.around) * work.accumulation + UPDATE_BYTES * moved.updated
    waits = {kind: cluster.seconds(*cluster.split(sent)) for kind, sent in traffic.items()}
    memory = to_memory / (device.memory_gbs * 1e9 * MEMORY_EFFICIENCY)
    return StepTime(
        compute=3 * forward,
        rerun=rerun,
        memory=memory,
        exposed=_exposed(waits, forward, rerun, work.strategy),
        sequence=_sequence_seconds(between, work, cluster),
        offload=max(0.0, 2 * moved.host * work.accumulation / (HOST_GBS * 1e9) - 2 * forward - rerun),
        launches=max(0.0, moved.host_s - 3 * forward - rerun - memory),
        muon=moved.orthogonalising / (1e12 * device.bf16_tflops * device.products),
        flops=3 * sum(flops.values()) * tokens * cluster.world,
    ).times(cluster.slower)


def _exposed(waits: dict[str, float], forward: float, rerun: float, strategy: Strategy) -> float:
    """Return the seconds of communication that do not overlap with computation.

    Gradients overlap with the backward pass. ZeRO-3 gathers weights during both passes; lower stages gather them in the
    update, and Muon sends its momentum there, where nothing overlaps.
    """
    if not strategy.overlap_comm:
        return sum(waits.values())
    gathers = waits.get(GATHER, 0.0) if strategy.stage == 3 else 0.0
    updates = sum(waits.get(kind, 0.0) for kind in (MOMENTUM, GATHER)) - gathers
    reduces = sum(waits.values()) - gathers - updates
    backward = 2 * forward + rerun
    return updates + max(0.0, reduces - backward, reduces + gathers - forward - backward)


def share_rerun(checkpointing: ActivationCheckpointingConfig, depth: int) -> float:
    """Return the share of the layers' forward pass that is recomputed in the backward pass."""
    again = sum(checkpointing.runs_again(index) for index in range(depth)) / depth
    return again * (SELECTIVE_RERUN if checkpointing.policy == "selective" else 1.0)


def _forward_seconds(flops: dict[str, float], tokens: int, device: Accelerator, bf16: bool) -> tuple[float, float]:
    """Return the seconds of one rank's forward passes per step, of the whole model and of the layers alone."""
    peak = device.peak_flops(bf16)
    rates = dict.fromkeys(ATTENTION, peak * device.attention)
    rates |= dict.fromkeys(SINGLE_PRECISION, 1e12 * device.fp32_tflops * SINGLE_EFFICIENCY)
    seconds = {term: tokens * count / rates.get(term, peak * device.products) for term, count in flops.items()}
    return sum(seconds.values()), sum(seconds.values()) - seconds["head"]


def _sequence_seconds(between: dict[str, int], work: Work, cluster: Cluster) -> float:
    """Return the seconds per step that a rank waits for messages between the ranks that share a sequence.

    If a sequence spans several nodes, the slowest rank has its neighbour on another node.
    """
    if not between:
        return 0.0
    spans = work.slice.sp > cluster.per_node
    device = cluster.accelerator
    rate = (device.between_nodes_gbs if spans else device.in_node_gbs) * 1e9 * LINK_EFFICIENCY
    messages = len(between) * work.depth * (work.accumulation + work.edge_passes)
    return sum(between.values()) / rate + messages * LATENCY_S
