"""Peak memory of one rank: the largest of all phases of a step, by class.

The phases are: forward of every layer, head and loss, backward of every layer, the embedding, the reduction of
gradients, the update. The last micro-batch of a step needs most, because gradients of the earlier ones exist.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from bst_dist.activation.config import ActivationCheckpointingConfig
from bst_dist.parallel.sequence.slices import Spacing
from bst_dist.plan.memory.activations import Activations
from bst_dist.plan.memory.gathering import Gathered, gather
from bst_dist.plan.memory.parts import Part, Slice
from bst_dist.plan.memory.zero import WORD, Sizes, States, Strategy, states

INPUT_BYTES = 17
"""Bytes per input token: id and label of 64 bits each, and a mask of one byte."""


@dataclass(frozen=True)
class Work:
    """The work of one rank in a step, and its ZeRO strategy."""

    strategy: Strategy
    world: int
    slice: Slice
    accumulation: int
    """Backward passes per step: micro-batches times slices per sequence."""
    checkpointing: ActivationCheckpointingConfig
    depth: int
    """Number of layers of the model."""
    slices: int = 1
    """Slices per sequence; `slice` is a rank's part of one."""
    edges: str = "device"
    """Where edges are kept until the backward pass: device, host or disk."""
    edges_every: int = 1
    """One in this many edges is kept; the others are recomputed."""
    compiled: bool = False
    """Whether each layer is one compiled graph, forward and backward."""
    averaged: bool = False
    """Whether an average of the weights is kept besides the moments (train.average)."""

    @property
    def spacing(self) -> Spacing:
        """Which edges are kept until the backward pass."""
        return Spacing(self.slices, self.edges_every)

    @property
    def edge_passes(self) -> int:
        """Forward passes per step that only compute edges."""
        return self.accumulation // self.slices * self.spacing.passes

    def rerun(self) -> list[bool]:
        """Return, for each layer, whether it is recomputed in the backward pass."""
        return [self.checkpointing.runs_again(index) for index in range(self.depth)]


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a step."""

    phase: str
    """Name of the phase with the peak."""
    weights: int
    optimizer: int
    gradients: int
    activations: int
    """Activations kept between the passes, and the running layer's own tensors, casts of weights included."""
    loss: int
    """Head and loss: tiles of logits, and their gradients."""
    buffers: int
    """ZeRO's buffers: buckets, copies of them, gathered weights."""
    host: int = 0
    """Bytes in host memory, in addition."""

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return sum(self.classes().values())

    def classes(self) -> dict[str, int]:
        """Return the bytes on the device by class."""
        names = ("weights", "optimizer", "gradients", "activations", "loss", "buffers")
        return {name: getattr(self, name) for name in names}


def memory(sizes: Sizes, mixers: list[str], activations: Activations, work: Work) -> Memory:
    """Return the peak memory of a step with these layers."""
    return max(_Step(sizes, mixers, activations, work).phases(), key=lambda phase: phase.total)


class _Step:
    """Memory of the last micro-batch of a step, and of the update, phase by phase."""

    def __init__(self, sizes: Sizes, mixers: list[str], activations: Activations, work: Work) -> None:
        self.sizes, self.work = sizes, work
        self.state: States = states(sizes, work.strategy, work.world, work.accumulation)
        rerun = work.rerun()
        self.layers = [_layer(activations, mixer, again, work) for mixer, again in zip(mixers, rerun, strict=True)]
        self.head = activations.head(work.slice)
        none = (0,) * len(mixers)
        self.gathered = Gathered(none, none, 0, 0)
        if work.strategy.stage == 3 and work.world > 1:
            self.gathered = gather(sizes, work.strategy, rerun)
        tokens = work.slice.rows * work.slice.length
        self.inputs = INPUT_BYTES * tokens
        self.edges, self.edges_on_host = _edges(activations, work)
        self.residual = WORD * tokens * activations.model.width
        self.embedding = WORD * sizes.embedding
        self.tied = 0 if sizes.head else self.embedding

    def phases(self) -> Iterator[Memory]:
        yield from self._forward()
        yield from self._backward()
        reducing = self.state.buckets + self.state.reducing
        yield self._phase("gradient reduction", self._gradients(self.sizes.total), 0, buffers=reducing)
        stage = self.work.strategy.stage
        gradients = self.state.gradients if stage in (0, 3) else 0  # in stages 1 and 2 `updating` includes them
        buffers = (self.state.buckets if stage == 3 else 0) + self.state.updating
        yield self._phase("update", gradients, 0, buffers=buffers)

    def _forward(self) -> Iterator[Memory]:
        earlier, bucket = self._earlier()
        before = casts = 0
        for index, (part, whole) in enumerate(zip(self.layers, self.gathered.forward, strict=True)):
            activations = before + casts + part.forward
            yield self._phase(f"forward of layer {index}", earlier, activations, buffers=bucket + whole)
            before, casts = before + part.kept, casts + part.casts
        whole = bucket + self.gathered.between
        yield self._phase("loss", earlier, before + casts, self.head.forward, whole)
        yield self._phase("backward of the loss", earlier, before, self.head.kept + self.head.backward, whole)

    def _backward(self) -> Iterator[Memory]:
        produced = self.sizes.rest + self.sizes.head
        kept = sum(part.kept for part in self.layers)
        for index in reversed(range(len(self.layers))):
            part = self.layers[index]
            produced += self.sizes.of_layer(index)
            # If no gradients exist yet, those that a compiled layer makes become the gradients: count them once.
            stay = part.gradients if self.work.strategy.stage < 2 and not self._earlier()[0] else 0
            buffers = self.state.buckets + self._flush(produced) + self.gathered.backward[index]
            gradients = self._gradients(produced) - stay + self.tied
            yield self._phase(f"backward of layer {index}", gradients, kept + part.backward, buffers=buffers)
            kept -= part.kept
        gradients = self._gradients(produced) + self.tied + self.embedding
        yield self._phase("embedding", gradients, self.residual, buffers=self.state.buckets + self._flush(produced))

    def _earlier(self) -> tuple[int, int]:
        """Return the bytes of gradients and buckets that exist during forward of the last micro-batch."""
        stage, more = self.work.strategy.stage, self.work.accumulation > 1
        if stage == 3:
            return self.state.gradients, self.state.buckets
        if stage == 2:
            return (self.state.gradients // 2 if more else 0), 0
        return (self.state.gradients, self.state.buckets) if more else (0, 0)

    def _gradients(self, produced: int) -> int:
        """Return the bytes of gradients in the last backward pass, when `produced` elements have their gradient."""
        stage = self.work.strategy.stage
        earlier = self._earlier()[0]
        if stage == 3:
            return earlier
        if stage == 2:
            return self.state.gradients if produced > self.work.strategy.reduce_bucket_size else earlier
        return earlier or WORD * produced

    def _flush(self, produced: int) -> int:
        """Return the bytes of the copy of a full bucket; 0 before a bucket was full, or in stages 0 and 1."""
        eager = self.work.strategy.stage >= 2 and produced > self.work.strategy.reduce_bucket_size
        return self.state.reducing if eager else 0

    def _phase(self, name: str, gradients: int, activations: int, loss: int = 0, buffers: int = 0) -> Memory:
        host = sum(part.host for part in self.layers) + self.edges_on_host
        average = (self.state.master or self.state.weights) if self.work.averaged else 0  # of the rank's own share
        return Memory(
            phase=name,
            weights=self.state.weights,
            optimizer=self.state.master + self.state.moments + average,
            gradients=gradients,
            activations=activations + self.inputs + self.edges,
            loss=loss,
            buffers=buffers,
            host=host,
        )


AT_WORK = 4
"""Edges on the device in any case: the one that a slice reads, the one that it leaves, and the gradients of both."""


def _edges(activations: Activations, work: Work) -> tuple[int, int]:
    """Return the bytes of edges on the device and in host memory, on the rank that holds them (the first of a
    sequence)."""
    if work.slices == 1:
        return 0, 0
    one = activations.edge(work.slice.rows)
    spacing = work.spacing
    waiting = {"device": (spacing.waiting, 0), "host": (0, spacing.waiting), "disk": (0, 2)}[work.edges]
    return one * (AT_WORK + spacing.between + waiting[0]), one * waiting[1]


def _layer(activations: Activations, mixer: str, again: bool, work: Work) -> Part:
    checkpointing = work.checkpointing if again else ActivationCheckpointingConfig()
    part = activations.layer(mixer, checkpointing, work.slice, zero3=work.strategy.stage == 3, compiled=work.compiled)
    if not (activations.fused and part.host):
        return part
    # On an accelerator, offloaded inputs are not on the device, except the next one, which is being copied back.
    return replace(part, kept=part.kept - part.host, backward=part.backward + part.host)
