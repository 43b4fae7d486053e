"""The interface of the past: what a layer may read of the tokens before its slice.

Every mixing layer computes ``y = f(x, past)`` on a slice of B rows and l tokens. It asks its past for two things: the
last positions before the slice (keys and values, MF's block-end states), and the recurrent state before the slice.
Three sources have this interface, and a layer does not know which one it has:

- `Past` itself: nothing came before;
- `EarlierCall`: what an earlier call left (a document streamed over training steps, generation token by token). It
  holds values without gradients: the paper's non-differentiable sequence cache. Its subclass `Edge`
  (`bst_dist.parallel.sequence.slices`) connects two slices of one sequence, and sends gradients back;
- `LeftNeighbour`: what the ranks to the left hold, under sequence parallelism (`bst_dist.parallel.sequence.neighbour`).

The shape of the answer tells how much exists: `extend` adds at most as many positions as were asked for, and fewer or
none when fewer exist. So no layer needs a flag or a mask for the start of a stream.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor

State: TypeAlias = dict[str, Tensor]
"""What a call leaves for the next call: detached tensors by name, with the batch as first dimension."""


T = TypeVar("T")


class Reached(NamedTuple):
    """All channels of a slice, or some channels of the whole sequence, with the past of these tokens."""

    x: Tensor
    """(B, l, Ds), or (B, L, Ds / sp): all tokens of the sequence and this rank's share of the channels."""
    past: Past
    channels: slice
    """Which of the Ds channels these are."""
    back: Callable[[Tensor], Tensor]
    """Maps results for these channels, channels last, to all channels of the slice: (B, L', .., Ds / sp) ->
    (B, l', .., Ds)."""


class Past:
    """An empty past: nothing came before this slice. Also the base class of all other sources."""

    position: int = 0
    """Tokens of the stream before this slice."""

    def __init__(self) -> None:
        self.shared: dict[str, object] = {}
        """The results of `once`; all parts of the model share this dictionary."""

    def once(self, name: str, make: Callable[[], T]) -> T:
        """Return a value that all layers of a call share, because it depends only on shapes and document starts.

        Examples are masks and tables of positions. The first layer that asks makes the value. `name` must contain all
        that it depends on.
        """
        if name not in self.shared:
            self.shared[name] = make()
        return self.shared[name]

    def extend(self, name: str, x: Tensor, before: int, after: int | None = None) -> Tensor:
        """Put the last positions before the slice in front of `x`: (B, l, ...) -> (B, p + l, ...), p <= `before`.

        `after`: how many positions the next slice will ask for, if not `before`.
        """
        return x

    def extend_stacked(
        self, x: Tensor, y: Tensor, dim: int, extend: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return the result of `extend`, a call of `extend` or `extend_to_blocks`, for two tensors stacked in `dim`.

        If nothing came before, they are not stacked, because stacking would copy both and their gradients.
        """
        return (x, y) if type(self) is Past else extend(torch.stack((x, y), dim)).unbind(dim)

    def extend_to_blocks(self, name: str, x: Tensor, block: int, whole: int = 0) -> Tensor:
        """Extend by the positions of the block that the slice begins in, and of `whole` blocks before that.

        For a slice that begins at a block of W tokens, these are at most `whole` W positions; for a slice that begins
        p tokens into a block, p more.
        """
        offset = self.offset(block)
        following = (offset + x.shape[1]) % block
        return self.extend(name, x, before=offset + whole * block, after=following + whole * block)

    def offset(self, block: int) -> int:
        """Return how many tokens into its block the slice begins: 0 unless the slice lies within a block."""
        return self.position % block

    def blocks_ended(self, block: int, length: int) -> int:
        """Return how many blocks have their last token in the slice of `length` tokens."""
        return (self.offset(block) + length) // block

    def within_reach(self, name: str, x: Tensor, positions: int) -> Reached:
        """Return `x` in a form for which `extend` can give that many `positions`: unchanged, or sharded by channels.

        For layers that have no state to pass on, look back further than a slice, and treat channels separately.
        """
        return Reached(x, self, slice(None), lambda y: y)

    def state(self, name: str, end: Tensor, transition: Tensor) -> Tensor | None:
        """Return the state before the slice (B, ...), or None when there is none.

        The state after the slice is ``transition * state + end``. `end` (B, ...) is the state that the slice alone
        leaves, starting from zero. `transition` is (...) when it is the same for all rows and slices, else (B, ...),
        with as many dimensions as `end`.
        """
        return None

    def start_state(self, name: str, end: Tensor, transition: Tensor) -> Callable[[], Tensor | None]:
        """Begin to get the state, and return a function that gives it, as `state` does.

        The state may be on its way from another rank until then. Meanwhile a layer computes what does not need it.
        """
        state = self.state(name, end, transition)
        return lambda: state

    def serial_state(self, name: str) -> Tensor | None:
        """Return the state before the slice, for states that are not elementwise affine maps (Block-Recurrent)."""
        return None

    def leave_serial_state(self, name: str, value: Tensor) -> None:
        """Leave the state after the slice for the next call of `serial_state`."""

    def child(self, name: str) -> Past:
        """Return the same past for one part of the model, whose names are separate."""
        return self


class RecordedPast(Past):
    """An empty past that also records what it is asked for with `once`."""

    def __init__(self, past: Past):
        """`past`: where the values are shared."""
        super().__init__()
        self.shared = past.shared
        self.recorded: dict[str, object] = {}

    def once(self, name: str, make: Callable[[], T]) -> T:
        self.recorded[name] = value = super().once(name, make)
        return value


class EarlierCall(Past):
    """What an earlier call left, without gradient. Collects in `after` what this call leaves.

    Reading and writing are separate, so that a layer that is recomputed in the backward pass sees the same past.
    """

    differentiable = False
    """Whether gradients may flow back to what this call leaves (`bst_dist.parallel.sequence.slices`)."""

    def __init__(self, before: State | None = None, position: int = 0):
        super().__init__()
        self.before = before or {}
        self.after: State = {}
        self.position = position
        self._prefix = ""

    def held(self, name: str) -> Tensor | None:
        """Return what the earlier call left under this name; None if nothing."""
        return self.before.get(self._prefix + name)

    def leave(self, name: str, value: Tensor) -> None:
        """Leave `value` for the next call."""
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
        part = copy(self)  # shares `before` and `after`
        part._prefix = f"{self._prefix}{name}."
        return part
