"""Where the edges of slices wait between the two passes of a step: on the device, in host memory, or on disk.

Edges go in from the first slice to the last and come back from the last to the first, so each place is a stack, and
the one that is needed next is always known: it is sent for while the slice before it in time is still at work.
"""

from __future__ import annotations

import os
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from bst_base.errors import UserError
from bst_dist.activation.offload import HostCopies
from bst_dist.parallel.sequence.past import State
from bst_dist.parallel.sequence.slices import Edges, EdgesHere

Place = Literal["device", "host", "disk"]


class EdgeFileError(UserError):
    """The file of edges cannot be written or read."""


def edges_in(place: Place) -> Edges:
    """An empty stack of edges in that place."""
    return {"device": EdgesHere, "host": EdgesInHostMemory, "disk": EdgesOnDisk}[place]()


class EdgesInHostMemory:
    """Edges in the host's memory, pinned where there is CUDA, copied both ways beside the computation."""

    def __init__(self) -> None:
        self._copies = HostCopies()
        self._stack: list[dict[str, tuple[object, bool]]] = []

    def push(self, edge: State) -> None:
        """Begin to copy an edge to the host."""
        self._stack.append({name: (self._copies.pack(_real(x)), x.is_complex()) for name, x in edge.items()})

    def pop(self) -> State:
        """The edge pushed last, on its device; the one below it is sent for."""
        edge = {name: _as_it_was(self._copies.unpack(kept), pairs) for name, (kept, pairs) in self._stack.pop().items()}
        for kept, _ in self._stack[-1].values() if self._stack else ():
            if not isinstance(kept, Tensor):
                kept.send()
        return edge

    @property
    def bytes(self) -> int:
        """What lies in the host's memory now."""
        return self._copies.bytes


class _Kept(NamedTuple):
    """Where one tensor of an edge lies in the file."""

    offset: int
    bytes: int
    shape: torch.Size
    dtype: torch.dtype
    """Of the real numbers in the file."""
    pairs: bool
    """Whether they are complex numbers' parts."""
    device: torch.device


class EdgesOnDisk:
    """Edges in one file, written and read ahead by a thread: at most two are in memory.

    The file lies in the system's folder for temporary files (the environment's TMPDIR) and has no name, so nothing is
    left of it when the process ends, however it ends. A folder in memory (tmpfs) would save none.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="bst-edges-")  # noqa: SIM115 (it lives as long as this)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="edges")
        self._stack: list[dict[str, _Kept]] = []
        self._end = 0
        self._writing: Future[None] | None = None
        self._ahead: Future[dict[str, Tensor]] | None = None

    def push(self, edge: State) -> None:
        """Begin to write an edge. Raises EdgeFileError when an earlier one could not be written."""
        self._ahead = None  # of a stack that has grown again
        kept, data = {}, []
        for name, x in edge.items():
            numbers = _real(x).detach().contiguous().cpu()
            kept[name] = _Kept(self._end, numbers.nbytes, numbers.shape, numbers.dtype, x.is_complex(), x.device)
            data.append((self._end, numbers))
            self._end += numbers.nbytes
        self._wait()
        self._writing = self._thread.submit(self._write, data)
        self._stack.append(kept)

    def pop(self) -> State:
        """The edge pushed last, on its device; the one below it is read meanwhile."""
        self._wait()
        kept = self._stack.pop()
        data = self._ahead.result() if self._ahead else self._read(kept)
        self._ahead = self._thread.submit(self._read, self._stack[-1]) if self._stack else None
        self._end = min((one.offset for one in kept.values()), default=self._end)
        return {name: _as_it_was(data[name].to(one.device), one.pairs) for name, one in kept.items()}

    @property
    def bytes(self) -> int:
        """What lies in the file now."""
        return self._end

    def _wait(self) -> None:
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def _write(self, data: list[tuple[int, Tensor]]) -> None:
        for offset, numbers in data:
            view = memoryview(numbers.view(-1).view(torch.uint8).numpy())
            while view:
                try:
                    done = os.pwrite(self._file.fileno(), view, offset)
                except OSError as error:
                    raise EdgeFileError(
                        f"cannot write the edges of slices in {tempfile.gettempdir()} ({error.strerror} after "
                        f"{offset:,} bytes): set TMPDIR to a folder with more space, or train.edges to host"
                    ) from error
                view, offset = view[done:], offset + done

    def _read(self, kept: dict[str, _Kept]) -> dict[str, Tensor]:
        found = {}
        for name, one in kept.items():
            pinned = one.device.type == "cuda"
            numbers = torch.empty(one.shape, dtype=one.dtype, pin_memory=pinned)
            view, offset = memoryview(numbers.view(-1).view(torch.uint8).numpy()), one.offset
            while view:
                done = os.preadv(self._file.fileno(), [view], offset)
                if not done:
                    raise EdgeFileError(f"the file of edges in {tempfile.gettempdir()} ended at {offset:,} bytes")
                view, offset = view[done:], offset + done
            found[name] = numbers
        return found


def _real(x: Tensor) -> Tensor:
    """Complex numbers as pairs, which files and hooks know."""
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def _as_it_was(x: Tensor, pairs: bool) -> Tensor:
    return torch.view_as_complex(x) if pairs else x
