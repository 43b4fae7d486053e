"""ZeRO-3's gathered weights: how many are whole at once, and how often each is gathered.

Modules are gone through in the order of a micro-batch's passes, by the rules of DeepSpeed's coordinator: what a module
needs is gathered, and what comes next up to `prefetch_bucket_size` with it; what it had is given up, unless it is
needed again within `max_reuse_distance` elements, or was passed over by the prefetch because it was still there. An
embedding that is the head as well stays; a head of its own and the embedding are modules like the others, after and
before the layers. DeepSpeed first records the order of one step; this is a step after that.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bst_dist.plan.memory.zero import WORD, Place, Sizes, Strategy


@dataclass(frozen=True)
class Gathered:
    """Of one micro-batch."""

    forward: tuple[int, ...]
    """Most bytes of whole weights while each layer runs forward."""
    backward: tuple[int, ...]
    """The same in the backward pass."""
    between: int
    """After the last layer, where the loss is computed."""
    received: int
    """Bytes of everything that is gathered, as it is sent."""


def gather(sizes: Sizes, strategy: Strategy, rerun: Sequence[bool]) -> Gathered:
    """Gathered weights of every layer; `rerun` says which layers run again in the backward pass."""
    depth, threshold = len(sizes.layers), strategy.param_persistence_threshold
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
    """Pass, layer and parameters of every module in turn: forward, then backward with what runs again before it."""
    layers = [
        [[(layer, module, place) for place in range(len(own))] for module, own in enumerate(modules)]
        for layer, modules in enumerate(sizes.layers)
    ]
    embedding, head = [(-1, 0, 0)], [(len(layers), 0, 0)]
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
    """The rules, over one micro-batch."""

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
        """Bytes that were sent to gather, and that lie here, in single precision."""
        self.queue = deque((step, use) for step, (_, _, module) in enumerate(order) for use in module)
        self.fetched_for = dict.fromkeys(self.elements, -1)
        """The latest step that each has been fetched for."""
        self.uses: dict[Place, list[int]] = {}
        self.passed = [0]
        """Elements of all modules before each step."""
        for step, (_, _, module) in enumerate(order):
            self.passed.append(self.passed[-1] + sum(self.elements[use] for use in module))
            for use in module:
                self.uses.setdefault(use, []).append(step)

    def steps(self) -> Iterator[tuple[str, int, int]]:
        """Pass, layer and bytes of what is whole, for each module."""
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
        """Gather what comes next; several are gathered in one flat tensor, which is there beside them for a moment."""
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
