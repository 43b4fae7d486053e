"""Offloading to host memory of tensors that autograd keeps between the passes.

On CUDA the copies run on a separate stream and overlap with computation: to the host while the next layers run forward,
and back one tensor ahead of the backward pass. torch's own `save_on_cpu` copies on the computation's stream, which
waits for every byte.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor


class HostCopies:
    """The pair of hooks ``(pack, unpack)`` for `torch.autograd.graph.saved_tensors_hooks`.

    On a CPU the tensors are copied too. This saves no memory, but lets everything else be tested.
    """

    def __init__(self) -> None:
        self._stream: Any = None
        self._live: weakref.WeakSet[_Copy] = weakref.WeakSet()
        self._last: weakref.ref[_Copy] | None = None

    @property
    def bytes(self) -> int:
        """Bytes in host memory now."""
        return sum(copy.host.nbytes for copy in self._live)

    def pack(self, x: Tensor) -> _Copy | Tensor:
        """Copy a tensor that autograd would keep. Integers and bools are small tables, and are not copied."""
        if not x.is_floating_point():
            return x
        if x.is_cuda and self._stream is None:
            self._stream = torch.cuda.Stream(x.device)
        copy = _Copy(x, self._stream, self._last)
        self._last = weakref.ref(copy)
        self._live.add(copy)
        return copy

    def unpack(self, packed: _Copy | Tensor) -> Tensor:
        """Return the tensor on its device, and prefetch the one packed before it, which is needed next."""
        if not isinstance(packed, _Copy):
            return packed
        x = packed.arrive()
        if packed.before is not None:
            before = packed.before()
            if before is not None:
                before.send()
        return x


class _Copy:
    """One tensor while it is in host memory."""

    def __init__(self, x: Tensor, stream: Any, before: weakref.ref[_Copy] | None) -> None:
        self.device, self.stream, self.before = x.device, stream, before
        self.host = torch.empty_like(x, device="cpu", pin_memory=stream is not None)
        self.returning: Tensor | None = None
        if stream is None:
            self.host.copy_(x)
            return
        stream.wait_stream(torch.cuda.current_stream(x.device))  # x is computed on that stream
        with torch.cuda.stream(stream):
            self.host.copy_(x, non_blocking=True)
        x.record_stream(stream)  # its memory is not reused before the copy ends

    def send(self) -> None:
        """Start copying it back, on its stream."""
        if self.stream is not None and self.returning is None:
            with torch.cuda.stream(self.stream):
                self.returning = self.host.to(self.device, non_blocking=True)

    def arrive(self) -> Tensor:
        """Return the tensor on its device, ready for the current stream."""
        if self.stream is None:
            return self.host
        self.send()
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self.stream)
        x, self.returning = self.returning, None
        x.record_stream(current)
        return x
