"""Storage for the edges of slices between the two passes of a step: on the device, in host memory, or on disk.

Edges are written from the first slice to the last and read from the last to the first. So each storage is a stack, and
the next edge is always known: it is prefetched while the current slice is computed.
"""

from __future__ import annotations

import os
import socket
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from bst_base.errors import StorageError
from bst_dist.activation.offload import HostCopies
from bst_dist.parallel.sequence.past import State
from bst_dist.parallel.sequence.slices import Edges, EdgesHere

Place = Literal["device", "host", "disk"]


class EdgeFileError(StorageError):
    """The file of edges cannot be written or read. A restart may succeed: the file disappears with its process."""


def edges_in(place: Place) -> Edges:
    """Return an empty stack of edges in that place."""
    return {"device": EdgesHere, "host": EdgesInHostMemory, "disk": EdgesOnDisk}[place]()


class EdgesInHostMemory:
    """A stack of edges in host memory, pinned if there is CUDA. Copies in both directions overlap with computation."""

    def __init__(self) -> None:
        self._copies = HostCopies()
        self._stack: list[dict[str, tuple[object, bool]]] = []

    def push(self, edge: State) -> None:
        """Start copying an edge to the host."""
        self._stack.append({name: (self._copies.pack(_real(x)), x.is_complex()) for name, x in edge.items()})

    def pop(self) -> State:
        """Return the edge pushed last, on its device, and prefetch the one below it."""
        edge = {name: _as_it_was(self._copies.unpack(kept), pairs) for name, (kept, pairs) in self._stack.pop().items()}
        if self._stack:
            for kept, _ in self._stack[-1].values():
                if not isinstance(kept, Tensor):
                    kept.send()
        return edge

    @property
    def bytes(self) -> int:
        """Bytes in host memory now."""
        return self._copies.bytes


class _Kept(NamedTuple):
    """Where one tensor of an edge is in the file."""

    offset: int
    bytes: int
    shape: torch.Size
    dtype: torch.dtype
    """Dtype of the real numbers in the file."""
    pairs: bool
    """Whether they are the parts of complex numbers."""
    device: torch.device


class EdgesOnDisk:
    """A stack of edges in one file, written and prefetched by a thread: at most two are in memory.

    The file is in the system's folder for temporary files (the environment's TMPDIR) and has no name, so it disappears
    when the process ends, for any reason. If this folder is in memory (tmpfs), no memory is saved.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="bst-edges-")  # noqa: SIM115 (it lives as long as this object)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="edges")
        self._stack: list[dict[str, _Kept]] = []
        self._end = 0
        self._writing: Future[None] | None = None
        self._ahead: Future[dict[str, Tensor]] | None = None

    def push(self, edge: State) -> None:
        """Start writing an edge. Raise EdgeFileError if an earlier edge could not be written."""
        self._ahead = None  # the prefetched edge is no longer the next one
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
        """Return the edge pushed last, on its device, and prefetch the one below it."""
        self._wait()
        kept = self._stack.pop()
        data = self._ahead.result() if self._ahead else self._read(kept)
        self._ahead = self._thread.submit(self._read, self._stack[-1]) if self._stack else None
        self._end = min((one.offset for one in kept.values()), default=self._end)
        return {name: _as_it_was(data[name].to(one.device), one.pairs) for name, one in kept.items()}

    @property
    def bytes(self) -> int:
        """Bytes in the file now."""
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
                        f"{socket.gethostname()} cannot write the edges of slices in {tempfile.gettempdir()} "
                        f"({error.strerror} after {offset:,} bytes): set TMPDIR to a folder with more space, or "
                        "train.edges to host"
                    ) from error
                view, offset = view[done:], offset + done

    def _read(self, kept: dict[str, _Kept]) -> dict[str, Tensor]:
        found = {}
        for name, one in kept.items():
            pinned = one.device.type == "cuda"
            numbers = torch.empty(one.shape, dtype=one.dtype, pin_memory=pinned)
            view = memoryview(numbers.view(-1).view(torch.uint8).numpy())
            offset = one.offset
            while view:
                done = os.preadv(self._file.fileno(), [view], offset)
                if not done:
                    raise EdgeFileError(
                        f"{socket.gethostname()}: the file of edges in {tempfile.gettempdir()} ended at {offset:,} "
                        "bytes"
                    )
                view, offset = view[done:], offset + done
            found[name] = numbers
        return found


def _real(x: Tensor) -> Tensor:
    """Return complex numbers as pairs of real numbers, which files and hooks support."""
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def _as_it_was(x: Tensor, pairs: bool) -> Tensor:
    return torch.view_as_complex(x) if pairs else x
