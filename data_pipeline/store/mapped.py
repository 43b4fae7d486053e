"""Memory-mapped files, out of which the kernel copies many runs of bytes in one call.

A page of a map that cannot be read kills a process that touches it (SIGBUS). So this process never touches the maps.
Instead, ``pwritev`` writes runs from them into a memory file (memfd): the kernel does the copy, and stops at a page
that cannot be read. This takes a quarter of the CPU time of a ``preadv`` for each run (0.6 instead of 2.2 µs for runs
of 300 tokens). That matters when rows consist of many short documents.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
import weakref
from contextlib import suppress
from pathlib import Path

import numpy as np

_RUNS = 1024  # maximum runs of one call (the kernel's IOV_MAX)
_LEAST = 1 << 20  # minimum bytes of a memory file that runs are collected in
_SPARE = 2  # unused memory files that are kept for reuse
_ANNOUNCED = 2  # number of calls with announced pages, at the start and after a call that read from a disk

_libc = ctypes.CDLL(None)
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64)
_libc.mmap.restype = ctypes.c_void_p
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.pwritev.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64)
_libc.pwritev.restype = ctypes.c_ssize_t
_FAILED = ctypes.c_void_p(-1).value


class MappedFile:
    """A file mapped into memory, as long as this object lives. It holds no file descriptor.

    Raises OSError when the file cannot be mapped, for example because it is empty.
    """

    def __init__(self, path: Path) -> None:
        with path.open("rb", buffering=0) as file:
            self.size = os.fstat(file.fileno()).st_size
            address = _libc.mmap(None, self.size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
        if address == _FAILED or address is None:
            raise OSError(f"{path}: cannot be mapped")
        self.address: int = address
        weakref.finalize(self, _libc.munmap, address, self.size)
        _libc.madvise(address, self.size, mmap.MADV_RANDOM)  # no read-ahead: read only the pages that are asked for


class Collector:
    """Collects runs of bytes, one after the other, in memory that is reused once nothing refers to it.

    New memory would cost a page fault for each page.
    """

    def __init__(self) -> None:
        self._spare: list[_Memory] = []
        self._announced = _ANNOUNCED  # number of next calls whose pages are announced to the kernel

    def collect(self, sources: np.ndarray, sizes: np.ndarray) -> np.ndarray | None:
        """Return the `sizes` bytes at the addresses `sources`, (m,) each, one after the other.

        Returns None if any of them cannot be read.
        """
        runs = np.empty((len(sizes), 2), np.uint64)  # struct iovec
        runs[:, 0], runs[:, 1] = sources, sizes
        before = _read()
        if self._announced:
            self._announced -= 1
            _announce(sources, sizes)
        try:
            return self._copied(runs, np.append(0, np.cumsum(sizes)))
        finally:
            if _read() > before:
                self._announced = _ANNOUNCED

    def _copied(self, runs: np.ndarray, bounds: np.ndarray) -> np.ndarray | None:
        memory, size = self._unused(), int(bounds[-1])
        memory.hold(size)
        data = np.frombuffer(memory.map, np.uint8, size)  # all views keep this array alive, and with it the memory
        weakref.finalize(data, self._keep, memory)
        for begin in range(0, len(runs), _RUNS):
            part = runs[begin : begin + _RUNS]
            done, end = int(bounds[begin]), int(bounds[begin + len(part)])
            if _libc.pwritev(memory.file.fileno(), part.ctypes.data, len(part), done) != end - done:
                return None
        return data

    def _unused(self) -> _Memory:
        with suppress(IndexError):
            return self._spare.pop()
        return _Memory()

    def _keep(self, memory: _Memory) -> None:
        if len(self._spare) < _SPARE:
            self._spare.append(memory)


class _Memory:
    """A memory file and its map."""

    def __init__(self) -> None:
        self.file = os.fdopen(os.memfd_create("rows"), "r+b", buffering=0)
        self._size = 0

    def hold(self, size: int) -> None:
        """Make room for `size` bytes. Nothing may refer to the earlier content any more."""
        if size > self._size:
            self._size = max(_LEAST, 1 << (size - 1).bit_length())
            os.truncate(self.file.fileno(), self._size)
            self.map = mmap.mmap(self.file.fileno(), self._size)


def _announce(sources: np.ndarray, sizes: np.ndarray) -> None:
    """Let the kernel start to read the pages of all runs. Otherwise each page is only read when its run is copied."""
    order = np.argsort(sources)
    begins = sources[order] & -mmap.PAGESIZE
    lengths = sources[order] + sizes[order] - begins
    for begin, length in zip(begins.tolist(), lengths.tolist(), strict=True):
        _libc.madvise(begin, length, mmap.MADV_WILLNEED)


def _read() -> int:
    """Return a counter that grows when this thread causes a read from a disk."""
    used = resource.getrusage(resource.RUSAGE_THREAD)
    return used.ru_inblock + used.ru_majflt  # some file systems do not count ru_inblock
