"""The past that the left neighbour's rank holds: sequence parallelism by passing states.

A sequence is sharded over the ranks of a group in slices of whole blocks. The tensors that cross a boundary are those
of the interface in `bst_dist.parallel.sequence.past`, and are the same few at any length: the recurrent state, one
block of keys and values, MF's last block end.

Every rank takes part in every exchange, forward and backward, in the same order, even if it does not need the result:
also a rank whose slice begins the sequence or a document. An exchange is one `autograd.Function` (for a state, two that
always run together), and its output is always used. So no rank leaves the others waiting in the backward pass. When
activation checkpointing recomputes a layer, all ranks repeat its exchanges.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import torch
from torch import Tensor

from bst_base.errors import UserError
from bst_dist.parallel.sequence.group import SequenceGroup
from bst_dist.parallel.sequence.past import EarlierCall, Past, Reached
from bst_dist.parallel.sequence.scan import start_exclusive_scan
from bst_dist.parallel.sequence.transpose import to_channels, to_tokens


class SequenceParallelError(UserError):
    """A layer cannot be computed with the sequence sharded over ranks."""


class LeftNeighbour(Past):
    """The past held by the ranks to the left; on the first rank, what an earlier call left.

    When a stream continues in the next call, the first rank then needs what the last rank has at its end. It receives
    this within the current call: the states in the all-gather that is made anyway, the rest by closing the line of
    ranks to a ring. If the next call sends a gradient back (`bst_dist.parallel.sequence.slices`), the gradient goes the
    same way to the last rank.

    Args:
        group: the ranks that share this sequence.
        slice_length: tokens of a slice, the same on all ranks.
        earlier: given on all ranks when the sequence continues from call to call. Only the first rank reads it and
            leaves values in it; on the others it is empty.
    """

    def __init__(self, group: SequenceGroup, slice_length: int, earlier: EarlierCall | None = None):
        super().__init__()
        self.group, self.slice_length, self.earlier = group, slice_length, earlier
        self.position = group.rank * slice_length + (earlier.position if earlier else 0)

    def extend(self, name: str, x: Tensor, before: int, after: int | None = None) -> Tensor:
        """Raise SequenceParallelError if more positions are asked for than one slice holds."""
        if before == 0 and not after:
            return x
        if x.shape[1] < before or after not in (None, before):
            raise SequenceParallelError(
                f"a layer needs {before} positions ({name}) before its slice of the sequence, but a slice has only "
                f"{x.shape[1]}, and it gets them from its left neighbour alone. Lower parallel.sp, lengthen "
                "train.sequence_length, or shorten the layer's reach (a window, ssm.length)"
            )
        ring = self.earlier is not None
        extended, around = _Extend.apply(x, before, self.group, name, ring, ring and self.earlier.differentiable)
        if self.earlier is None or self.group.rank > 0:
            return extended
        self.earlier.leave(name, around)
        held = self.earlier.held(name)
        return extended if held is None else torch.cat((held[:, -before:].to(x.dtype), extended), dim=1)

    def within_reach(self, name: str, x: Tensor, positions: int) -> Reached:
        """If a slice is shorter than `positions`, use two all-to-alls: to all tokens of some channels, and back.

        Raise SequenceParallelError if the ranks do not divide the channels, or if the sequence is a stream.
        """
        if positions <= self.slice_length:
            return super().within_reach(name, x, positions)
        channels, size = x.shape[-1], self.group.size
        if channels % size:
            raise SequenceParallelError(
                f"a layer looks {positions} positions back ({name}), further than its slice of {self.slice_length}, "
                f"and its {channels} channels cannot be divided evenly over {size} ranks instead: choose a "
                "parallel.sp that divides them, or another model.context.ssm_width"
            )
        if self.earlier is not None:
            raise SequenceParallelError(
                f"a layer looks {positions} positions back ({name}), further than its slice of {self.slice_length}; "
                "so each rank would hold the stream's last inputs for only some channels, which is not supported: "
                "set train.carry to false and train.slice_tokens to null, lower parallel.sp, or shorten ssm.length"
            )
        share, first = channels // size, self.group.rank * (channels // size)
        return Reached(
            to_channels(x, x.dim() - 1, self.group, name),
            Past(),
            slice(first, first + share),
            lambda y: to_tokens(y, y.dim() - 1, self.group, f"{name} back"),
        )

    def start_state(self, name: str, end: Tensor, transition: Tensor) -> Callable[[], Tensor]:
        """Return a function that gives the state. It is never None: with nothing before the first rank, it is zero."""
        streaming = self.earlier is not None and self.group.rank == 0
        held = self.earlier.held(name) if streaming else None
        if held is not None:
            end = end + transition * held
        finish_scan = start_exclusive_scan(end, transition, self.group, name)

        def finish() -> Tensor:
            state, last = finish_scan()
            if streaming:
                self.earlier.leave(name, last)
            return state if held is None else state + held

        return finish

    def state(self, name: str, end: Tensor, transition: Tensor) -> Tensor:
        return self.start_state(name, end, transition)()

    def serial_state(self, name: str) -> NoReturn:
        """Raise SequenceParallelError: the ranks would have to run one after the other."""
        raise SequenceParallelError(
            f"a layer's state ({name}) depends on the state before it by more than elementwise factors "
            "(Block-Recurrent, Gated DeltaNet, ssm.kernel s4-dplr), so sequence-parallel ranks would run one after "
            "the other: set parallel.sp to 1"
        )

    def child(self, name: str) -> Past:
        part = LeftNeighbour(self.group, self.slice_length, self.earlier and self.earlier.child(name))
        part.shared = self.shared
        return part


def past_of_slice(group: SequenceGroup | None, length: int, earlier: EarlierCall | None = None) -> Past:
    """Return the past of this rank's slice of `length` tokens: of the ranks that share the sequence, if there are any,
    and of an earlier call, if the stream continues from one."""
    return LeftNeighbour(group, length, earlier) if group else earlier or Past()


class _Extend(torch.autograd.Function):
    """Puts the left neighbour's last `count` positions in front of x. Backward, their gradient goes back to it.

    (B, l, ...) -> (B, count + l, ...), on the first rank (B, l, ...). The second output, on the first rank of a ring,
    is the last rank's positions, with gradient if `returning`; else it is empty.
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, count: int, group: SequenceGroup, kind: str, ring: bool, returning: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.count, ctx.group, ctx.kind, ctx.returning = count, group, kind, returning
        came = group.shift(x[:, -count:], kind, around=ring)()
        nothing = x.new_empty(0)
        extended, around = (x.view_as(x), came) if group.rank == 0 else (torch.cat((came, x), dim=1), None)
        around = nothing if around is None else around
        if not returning:
            ctx.mark_non_differentiable(around)
        return extended, around

    @staticmethod
    def backward(ctx, gradient: Tensor, of_around: Tensor) -> tuple:
        first = ctx.group.rank == 0
        # The gradient of what came from the left goes back there. The first rank of a line sends nothing.
        front = of_around if first and ctx.returning else gradient[:, : ctx.count]
        came = ctx.group.shift(front, f"{ctx.kind} gradient", to_left=True, around=ctx.returning)()
        own = gradient if first else gradient[:, ctx.count :]
        if came is not None:
            own = own.clone()
            own[:, -ctx.count :] += came
        return own, None, None, None, None, None
