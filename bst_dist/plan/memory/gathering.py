"""ZeRO-3's gathered weights: how many bytes are gathered at once, and how often each weight is gathered.

Simulates DeepSpeed's parameter coordinator over the modules in the order of a micro-batch's passes. Before a module
runs, its weights are gathered, and the next ones up to `prefetch_bucket_size` are prefetched. After it, its weights are
released, unless they are needed again within `max_reuse_distance` elements, or the prefetch skipped them because they
were still gathered. An embedding that is also the head stays gathered. An embedding and a separate head are modules
like the others, before and after the layers. DeepSpeed records the order of modules in its first step; this simulates a
later step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bst_dist.plan.memory.zero import WORD, Place, Sizes, Strategy


@dataclass(frozen=True)
class Gathered:
    """Gathered weights of one micro-batch."""

    forward: tuple[int, ...]
    """For each layer, the most bytes of gathered weights during its forward pass."""
    backward: tuple[int, ...]
    """The same for the backward pass."""
    between: int
    """Bytes of gathered weights after the last layer, when the loss is computed."""
    received: int
    """Total bytes gathered, in the precision in which they are sent."""


def gather(sizes: Sizes, strategy: Strategy, rerun: Sequence[bool]) -> Gathered:
    """Return the gathered weights of every layer; `rerun`: for each layer, whether it is recomputed in backward."""
    depth = len(sizes.layers)
    threshold = strategy.param_persistence_threshold
    always = sizes.embedding if sizes.embedding > threshold and not sizes.head else 0
    most = {way: dict.fromkeys(range(-1, depth + 1), 0) for way in ("forward", "backward")}
    coordinator = _Coordinator(sizes, strategy, list(_order(sizes, rerun)))
    between = 0
    for way, layer, whole in coordinator.steps():
        between = whole if way == "forward" else between
        most[way][layer] = max(most[way][layer], WORD * always + whole)
    received = WORD * always + coordinator.received
    forward, backward = (tuple(most[way][layer] for layer in range(depth)) for way in ("forward", "backward"))
    return Gathered(forward, backward, WORD * always + between, received)


Module = list[Place]


def _order(sizes: Sizes, rerun: Sequence[bool]) -> Iterator[tuple[str, int, Module]]:
    """Yield pass, layer and parameters of every module in order: forward, then backward.

    In backward, a recomputed layer's modules come before its backward.
    """
    layers = [
        [[(layer, module, place) for place in range(len(own))] for module, own in enumerate(modules)]
        for layer, modules in enumerate(sizes.layers)
    ]
    embedding = [(-1, 0, 0)]
    head = [(len(layers), 0, 0)]
    if sizes.head:
        yield "forward", -1, embedding
    yield from (("forward", layer, module) for layer, modules in enumerate(layers) for module in modules)
    if sizes.head:
        yield from ((way, len(layers), head) for way in ("forward", "backward"))
    for layer in reversed(range(len(layers))):
        again = layers[layer] if rerun[layer] else []
        yield from (("backward", layer, module) for module in (*again, *reversed(layers[layer])))
    if sizes.head:
        yield "backward", -1, embedding


class _Coordinator:
    """Simulates DeepSpeed's coordinator over one micro-batch."""

    def __init__(self, sizes: Sizes, strategy: Strategy, order: list[tuple[str, int, Module]]) -> None:
        self.order, self.strategy, self.sent = order, strategy, sizes.gathered_bytes
        self.elements = {
            (i, j, k): elements
            for i, modules in enumerate(sizes.layers)
            for j, own in enumerate(modules)
            for k, elements in enumerate(own)
        }
        if sizes.head:
            self.elements |= {(-1, 0, 0): sizes.embedding, (len(sizes.layers), 0, 0): sizes.head}
        self.persistent = {use for use, p in self.elements.items() if p <= strategy.param_persistence_threshold}
        self.whole: set[Place] = set(self.persistent)
        self.received = self.available = 0
        """Bytes received in all (as sent), and bytes of weights gathered now (in fp32)."""
        self.queue = deque((step, use) for step, (_, _, module) in enumerate(order) for use in module)
        self.fetched_for = dict.fromkeys(self.elements, -1)
        """For each parameter, the latest step that it has been fetched for."""
        self.uses: dict[Place, list[int]] = {}
        self.passed = [0]
        """Elements of all modules before each step."""
        for step, (_, _, module) in enumerate(order):
            self.passed.append(self.passed[-1] + sum(self.elements[use] for use in module))
            for use in module:
                self.uses.setdefault(use, []).append(step)

    def steps(self) -> Iterator[tuple[str, int, int]]:
        """Yield pass, layer and bytes of gathered weights for each module."""
        for step, (way, layer, module) in enumerate(self.order):
            for use in module:
                self._fetch(use)
            for _ in [use for use in module if self.fetched_for[use] < step]:
                at, first = self.queue.popleft()
                self.fetched_for[first] = at
            flat = self._prefetch()
            yield way, layer, self.available + flat
            for use in module:
                self._release(use, step + 1)

    def _fetch(self, use: Place) -> None:
        if use not in self.whole:
            self.whole.add(use)
            self.available += WORD * self.elements[use]
            self.received += self.sent(use)

    def _prefetch(self) -> int:
        """Prefetch the next weights; return the bytes of the temporary flat tensor (0 unless several are gathered)."""
        ahead: list[Place] = []
        elements = 0
        while self.queue and elements < self.strategy.prefetch_bucket_size:
            at, use = self.queue.popleft()
            self.fetched_for[use] = max(self.fetched_for[use], at)
            if use not in self.whole and use not in ahead:
                ahead.append(use)
                elements += self.elements[use]
        for use in ahead:
            self._fetch(use)
        return sum(map(self.sent, ahead)) if len(ahead) > 1 else 0

    def _release(self, use: Place, step: int) -> None:
        if use in self.persistent or use not in self.whole or self.fetched_for[use] >= step:
            return
        following = next((later for later in self.uses[use] if later >= step), None)
        if following is None or self.passed[following] - self.passed[step] >= self.strategy.max_reuse_distance:
            self.whole.discard(use)
            self.available -= WORD * self.elements[use]
