"""The contract for the past: what a layer may know of the tokens before its slice.

Every mixing layer computes ``y = f(x, past)`` on a slice of B rows and l tokens, and asks its past two questions: the
last positions before the slice (keys and values, MF's block-end states), and the recurrent state before the slice.
Three sources answer them behind one interface, and a layer does not know which one it has:

- `Past` itself: nothing came before;
- `EarlierCall`: what an earlier call left behind (a document streamed over training steps, a token generated at a
  time). It carries values, not gradients: the paper's non-differentiable sequence cache. Its kin `Edge`
  (`bst_dist.parallel.sequence.slices`) stands between two slices of one sequence, and sends gradients back;
- `LeftNeighbour`: the left neighbour's rank, under sequence parallelism (`bst_dist.parallel.sequence.neighbour`).

What is there to be found is told by shape: `extend` returns at most as many positions as were asked for, and fewer
(or none) when fewer exist, so no layer needs a flag or a mask for the start of a stream.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor

State: TypeAlias = dict[str, Tensor]
"""What a call leaves behind for the next one: names to tensors with the batch as first dimension, detached."""


T = TypeVar("T")


class Reached(NamedTuple):
    """Some channels of a slice, or of all slices of a sequence, and the past of what is there."""

    x: Tensor
    """(B, l, Ds), or (B, L, Ds / sp): all tokens of the sequence and this rank's share of the channels."""
    past: Past
    channels: slice
    """Which of the Ds channels these are."""
    back: Callable[[Tensor], Tensor]
    """From what was computed for them, channels last, to all channels of the slice: (B, L', .., Ds / sp) ->
    (B, l', .., Ds)."""


class Past:
    """Nothing came before this slice; also the interface of every other source."""

    position: int = 0
    """Tokens of the stream before this slice."""

    def __init__(self) -> None:
        self.shared: dict[str, object] = {}
        """What `once` was asked for; all parts of the model have one."""

    def once(self, name: str, make: Callable[[], T]) -> T:
        """What follows from shapes and document starts alone, so that it is the same in all layers of a call.

        Masks and tables of positions: the first layer that asks makes them. `name` says all that they depend on.
        """
        if name not in self.shared:
            self.shared[name] = make()
        return self.shared[name]

    def extend(self, name: str, x: Tensor, before: int, after: int | None = None) -> Tensor:
        """Put the last positions before the slice in front of `x`: (B, l, ...) -> (B, p + l, ...), p <= `before`.

        `after` is how many positions the next slice will ask for, when that is not `before`.
        """
        return x

    def as_one(self, x: Tensor, y: Tensor, dim: int, extend: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """What `extend`, a call of one of the methods around this one, makes of two tensors stacked in `dim`.

        Where nothing came before, they are not stacked: that would copy both, and their gradients.
        """
        return (x, y) if type(self) is Past else extend(torch.stack((x, y), dim)).unbind(dim)

    def extend_to_blocks(self, name: str, x: Tensor, block: int, whole: int = 0) -> Tensor:
        """`extend` with what belongs to the block that the slice begins in, and `whole` blocks before that.

        Between blocks of W tokens that is `whole` W positions at most; for a slice that begins p tokens into a block,
        p more.
        """
        offset = self.offset(block)
        following = (offset + x.shape[1]) % block
        return self.extend(name, x, before=offset + whole * block, after=following + whole * block)

    def offset(self, block: int) -> int:
        """Tokens of the block that the slice begins in, before the slice: 0 unless it lies within a block."""
        return self.position % block

    def blocks_ended(self, block: int, length: int) -> int:
        """Blocks whose last token is in the slice of `length` tokens."""
        return (self.offset(block) + length) // block

    def within_reach(self, name: str, x: Tensor, positions: int) -> Reached:
        """Where `extend` can be asked for that many `positions`: here, or with (B, l, Ds) spread in another way.

        For what has no state that could be passed on and looks back further than a slice: each channel by itself.
        """
        return Reached(x, self, slice(None), lambda y: y)

    def state(self, name: str, end: Tensor, transition: Tensor) -> Tensor | None:
        """The state before the slice (B, ...), or None when there is none.

        `end` (B, ...) is the state that the slice alone leaves behind, from zero; `transition` is what the slice
        multiplies an incoming state with: (...) when it is the same for all rows and slices, else (B, ...), with as
        many dimensions as `end`. The state after the slice is their affine map.
        """
        return None

    def start_state(self, name: str, end: Tensor, transition: Tensor) -> Callable[[], Tensor | None]:
        """Like `state`, but the state is had by calling what is returned, and may be under way until then.

        A layer computes what does not need it in between.
        """
        state = self.state(name, end, transition)
        return lambda: state

    def serial_state(self, name: str) -> Tensor | None:
        """The state before the slice when it is no affine map of the one before (Block-Recurrent)."""
        return None

    def leave_serial_state(self, name: str, value: Tensor) -> None:
        """Leave the state after the slice to whoever asks `serial_state` next."""

    def child(self, name: str) -> Past:
        """The same past for one part of the model, with names of its own."""
        return self


class EarlierCall(Past):
    """What an earlier call left behind, without gradient; collects in `after` what this call leaves.

    Reading and writing are apart, so that a layer run twice (recomputed in the backward pass) sees the same past.
    """

    differentiable = False
    """Whether a gradient may come back to what is left (`bst_dist.parallel.sequence.slices`)."""

    def __init__(self, before: State | None = None, position: int = 0):
        super().__init__()
        self.before = before or {}
        self.after: State = {}
        self.position = position
        self._prefix = ""

    def held(self, name: str) -> Tensor | None:
        """What the earlier call left under this name."""
        return self.before.get(self._prefix + name)

    def leave(self, name: str, value: Tensor) -> None:
        """Leave `value` to the next call."""
        self.after[self._prefix + name] = value.detach()

    def extend(self, name: str, x: Tensor, before: int, after: int | None = None) -> Tensor:
        held = self.held(name)
        x = x if held is None else torch.cat((held.to(x.dtype), x), dim=1)
        keep = before if after is None else after
        self.leave(name, x[:, max(0, x.shape[1] - keep) :].clone())
        return x if held is None else x[:, max(0, held.shape[1] - before) :]

    def state(self, name: str, end: Tensor, transition: Tensor) -> Tensor | None:
        held = self.held(name)
        self.leave(name, end if held is None else end + transition * held)
        return held

    def serial_state(self, name: str) -> Tensor | None:
        return self.held(name)

    def leave_serial_state(self, name: str, value: Tensor) -> None:
        self.leave(name, value)

    def child(self, name: str) -> EarlierCall:
        part = copy(self)  # sharing what was left and what is being left
        part._prefix = f"{self._prefix}{name}."
        return part
