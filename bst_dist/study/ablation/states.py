"""Changes of the context states before attention reads them: zeros, noise, or the states of another block.

A change gets the states that the blocks of a slice see, (B, nb, n, *), and their position in the document. It returns
the states that the blocks see instead. Random numbers depend only on the block's index in the document, so the results
do not depend on slices and batches. All documents have the same random numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from bst_dist.model.baselines.block_recurrent import BlockRecurrentMixer
from bst_dist.model.context import FilterContext, StreamContext
from bst_dist.parallel.sequence.past import Past
from bst_dist.study.ablation.cuts import Undo


@dataclass(frozen=True)
class Draws:
    """The random numbers of one layer."""

    seed: int
    layer: int

    def at(self, block: int) -> torch.Generator:
        """Return the generator for one block of a document."""
        word = np.random.SeedSequence([self.seed, self.layer, block]).generate_state(1, np.uint64)[0]
        return torch.Generator().manual_seed(int(word) % 2**63)


@dataclass(frozen=True)
class Place:
    """The position of a slice's states in the document, and the data that a change needs there."""

    first: int
    """Number of blocks of the document before the slice."""
    past: Past
    draws: Draws
    nothing: Tensor | float
    """The states that the first block of a document sees: zero, or the initial states of MF (S, Ds)."""


Change = Callable[[Tensor, Place], Tensor]


def zero(seen: Tensor, place: Place, strength: None) -> Tensor:
    return torch.zeros_like(seen)


def noise(seen: Tensor, place: Place, strength: float) -> Tensor:
    """Add Gaussian noise of `strength` times each state's root mean square over the channels."""
    return seen + replace(seen, place, strength)


def replace(seen: Tensor, place: Place, strength: float) -> Tensor:
    """Return Gaussian noise of `strength` times each state's root mean square over the channels."""
    size = seen.square().mean(-1, keepdim=True).sqrt()
    shape = seen.shape[2:]
    drawn = [torch.randn(shape, generator=place.draws.at(place.first + i)) for i in range(seen.shape[1])]
    return strength * size * torch.stack(drawn).to(seen)


def delay(seen: Tensor, place: Place, strength: int) -> Tensor:
    """Return the states seen `strength` blocks earlier; the first `strength` blocks get `place.nothing`."""
    known = place.past.extend("earlier", seen, before=strength)
    missing = strength + seen.shape[1] - known.shape[1]
    nothing = torch.as_tensor(place.nothing).to(seen).expand(len(seen), missing, *seen.shape[2:])
    return torch.cat((nothing, known), dim=1)[:, : seen.shape[1]]


def shuffle(seen: Tensor, place: Place, strength: int) -> Tensor:
    """Return for each block the states of a random one of the `strength` blocks before it. The first keeps its own.

    The blocks are of the same document, so that only information about time is lost, not about the document. They are
    earlier ones, because later states contain the tokens to predict. The reach is bounded for constant memory.
    """
    known = place.past.extend("earlier", seen, before=strength)
    before = known.shape[1] - seen.shape[1]
    chosen = []
    for i in range(seen.shape[1]):
        there = min(strength, place.first + i)
        back = int(torch.randint(there, (), generator=place.draws.at(place.first + i))) + 1 if there else 0
        chosen.append(before + i - back)
    return known[:, chosen]


CHANGES: dict[str, Callable[..., Tensor]] = {
    "zero": zero,
    "noise": noise,
    "replace": replace,
    "delay": delay,
    "shuffle": shuffle,
}


def change_context(context: StreamContext | FilterContext, block: int, draws: Draws, change: Change) -> Undo:
    """Change the states that the blocks of a BST layer attend to."""
    filters = isinstance(context, FilterContext)

    def hook(module: nn.Module, args: tuple, states: Tensor) -> Tensor:
        past = args[1]
        nothing = context.initial if filters else 0.0
        place = Place(past.position // block, past.child("intervention"), draws, nothing)
        seen = states if filters else states.unflatten(1, (-1, block))
        return change(seen, place).reshape(states.shape)

    return context.passage.register_forward_hook(hook).remove


def change_recurrent(mixer: BlockRecurrentMixer, block: int, draws: Draws, change: Change) -> Undo:
    """Change the states that the blocks of a Block-Recurrent layer attend to, but not the recurrent state."""
    at = 0

    def begin(module: nn.Module, args: tuple) -> None:
        nonlocal at
        at = args[1].position // block

    def hook(cell: nn.Module, args: tuple, output: tuple) -> tuple[Tensor, Tensor, Tensor]:
        nonlocal at
        place = Place(at, Past(), draws, nothing=0.0)
        k, v, _ = cell.forward(change(args[0].unsqueeze(1), place).squeeze(1), None)
        at += 1
        return k, v, output[2]

    handles = mixer.register_forward_pre_hook(begin), mixer.cell.register_forward_hook(hook)

    def undo() -> None:
        for handle in handles:
            handle.remove()

    return undo
