"""Interventions in a trained model: hooks remove a part of it or change its contents.

The code of the model does not know of them, and outside of `intervened` its results are bitwise unchanged. Each
intervention is causal: replacements of a block's context states use only states of this block and of earlier ones. No
intervention depends on how a document is cut into slices or batches: states of earlier slices come from the past, as in
the layers themselves, and random numbers are keyed by their position in the document.

Shapes: B rows, nb blocks of a slice, n states per block (W with SH and MH, S with MF), W tokens per block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from torch import nn

from bst_base.errors import UserError
from bst_dist.model.baselines.block_recurrent import BlockRecurrentMixer
from bst_dist.model.baselines.joint import JointMixer
from bst_dist.model.context import StreamContext
from bst_dist.model.layers import BSTMixer, NoCrossMixer
from bst_dist.model.lm import LanguageModel
from bst_dist.model.probes import kernel_of
from bst_dist.study.ablation import cuts, states


class Kind(NamedTuple):
    """A kind of intervention."""

    part: str
    """The part that it changes: "context" (states), "memory" (of the SSM), "cross" or "self" (attention)."""
    text: str
    strengths: tuple[float, ...] = ()
    """Default strengths; empty if the kind has no strength."""
    whole: bool = False
    """Whether the strength is a number of blocks (an integer)."""


KINDS: dict[str, Kind] = {
    "zero": Kind("context", "context states are zero"),
    "shuffle": Kind(
        "context", "a block sees the states of one of that many blocks before it, drawn at random", (16,), whole=True
    ),
    "delay": Kind("context", "a block sees the states of that many blocks earlier", (1, 4), whole=True),
    "noise": Kind("context", "noise is added, of that many times the root mean square of each state", (0.3, 1)),
    "replace": Kind("context", "states are replaced by noise of that many times their root mean square", (1,)),
    "forget": Kind("memory", "the SSM starts from zero at each block"),
    "no-cross": Kind("cross", "cross-attention gives zero"),
    "own-block": Kind("self", "self-attention sees only its own block"),
    "no-self": Kind("self", "self-attention gives zero"),
}


@dataclass(frozen=True)
class Intervention:
    """A kind of intervention, with its strength if the kind has one."""

    kind: str
    strength: float | None = None

    def __str__(self) -> str:
        return self.kind if self.strength is None else f"{self.kind}:{self.strength:g}"


def defaults() -> list[Intervention]:
    """Return every kind at its default strengths."""
    return [Intervention(name, strength) for name, kind in KINDS.items() for strength in kind.strengths or (None,)]


def parse(text: str) -> list[Intervention]:
    """Parse ``zero``, ``noise:0.5``, or ``noise`` (at its default strengths); raises UserError for any other text."""
    name, colon, given = text.partition(":")
    if name not in KINDS:
        raise UserError(f"no intervention {name!r}; there are: {', '.join(KINDS)}")
    kind = KINDS[name]
    if not colon:
        return [Intervention(name, strength) for strength in kind.strengths or (None,)]
    if not kind.strengths:
        raise UserError(f"{text}: {name} has no strength: {kind.text}")
    wanted = "a number of blocks, 1 or more" if kind.whole else "a number above 0"
    try:
        strength = int(given) if kind.whole else float(given)
    except ValueError:
        strength = 0
    if not 0 < strength < float("inf"):
        raise UserError(f"{text}: the strength of {name} is {wanted}: {kind.text}")
    return [Intervention(name, strength)]


def obstacle(mixer: nn.Module, kind: str) -> str | None:
    """Return why a kind of intervention does not apply to a layer's mixer; None if it applies."""
    part = KINDS[kind].part
    kinds = BSTMixer, JointMixer, BlockRecurrentMixer
    has_context = isinstance(mixer, kinds) and not isinstance(mixer, NoCrossMixer)
    if isinstance(mixer, JointMixer) and part in ("self", "cross"):
        return "one softmax over window and states, of which neither is cut"
    if part == "self":
        return None if hasattr(mixer, "attention") else "no self-attention"
    if part == "memory":
        kernel = None if isinstance(mixer, NoCrossMixer) else kernel_of(mixer)
        if kernel is None:
            return "no SSM"
        return None if hasattr(kernel, "block_ends") else "a selective state, which no intervention cuts yet"
    if not has_context:
        return "no context states"
    if kind in ("shuffle", "delay") and isinstance(mixer, BlockRecurrentMixer):
        return "a recurrent state, made from the one before it"
    return None


def same_as_zero(mixer: nn.Module) -> bool:
    """Whether cross-attention to zero states has the output zero.

    This holds for SH and MH. In the other variants an identity vector is added to each state.
    """
    return isinstance(mixer, BSTMixer) and isinstance(mixer.cross.context, StreamContext)


@contextmanager
def intervened(
    model: LanguageModel, intervention: Intervention, layers: Sequence[int], seed: int = 0
) -> Iterator[LanguageModel]:
    """Apply an intervention to some layers of the model, which it must fit, and undo it at the end.

    The model must get whole blocks, from the beginning of a document on. The state carried from slice to slice by
    `LanguageModel.carry` includes the memory of the intervention. Not for use under autograd.
    """
    with ExitStack() as stack:
        for index in layers:
            stack.callback(_install(model, intervention, index, seed))
        yield model


def _install(model: LanguageModel, intervention: Intervention, index: int, seed: int) -> Callable[[], None]:
    """Change one layer; return a function that undoes the change."""
    mixer, block = model.layers[index].mixer, model.config.block
    match intervention.kind:
        case "forget":
            return cuts.forget(kernel_of(mixer), block)
        case "no-cross":
            return cuts.without_cross(mixer)
        case "own-block":
            return cuts.own_block(mixer.attention, block)
        case "no-self":
            return cuts.without_output(mixer.attention)
    change = partial(states.CHANGES[intervention.kind], strength=intervention.strength)
    draws = states.Draws(seed, index)
    if isinstance(mixer, BlockRecurrentMixer):
        return states.change_recurrent(mixer, block, draws, change)
    return states.change_context(mixer.cross.context, block, draws, change)
