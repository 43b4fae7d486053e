"""Runs independent tasks in this process, in a pool of processes, or on the ranks of `mpirun`, with one interface."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

from bst_base.errors import UserError
from bst_base.launched import require_single_process

T = TypeVar("T")
R = TypeVar("R")
BY_MPI = "start it once, or with the mpirun of mpi4py's MPI"


class Workers:
    """The workers that run tasks, `count` at a time."""

    def __init__(self, executor: Executor | None, count: int) -> None:
        self._executor = executor
        self.count = count

    def run(self, function: Callable[[T], R], tasks: Iterable[T]) -> Iterator[R]:
        """Yield the results as they are ready, in any order. Tasks are drawn only as workers become free.

        The first error ends it. Raises UserError when a worker process was killed.
        """
        if self._executor is None:
            yield from map(function, tasks)
            return
        pending: set[Future[Any]] = set()
        try:
            for task in tasks:
                pending.add(self._executor.submit(function, task))
                if len(pending) >= 2 * self.count:  # one running and one waiting task for each worker
                    done, pending = wait(pending, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
            while pending:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        except BrokenProcessPool:
            message = (
                "a worker process was killed, perhaps for lack of memory; start again with fewer workers to continue"
            )
            raise UserError(message) from None
        finally:
            for future in pending:
                future.cancel()


def mpi_ranks() -> int:
    """Return the number of ranks that `mpirun` started this program on; 1 without it."""
    return int(os.environ.get("OMPI_COMM_WORLD_SIZE") or os.environ.get("PMI_SIZE") or 1)


@contextmanager
def open_workers(count: int | None) -> Iterator[Workers | None]:
    """Yield workers for the tasks of this program.

    On the MPI ranks that serve as workers, yield None after they have served. Under `mpirun -n N`, rank 0 runs the
    program and the other N - 1 ranks run its tasks; `count` is ignored. Otherwise `count` processes run them (None: one
    for each CPU that this process may use; 1: this process only).
    """
    ranks = mpi_ranks()
    if ranks > 1:
        from mpi4py import MPI  # only under mpirun: importing it initialises MPI
        from mpi4py.futures import MPICommExecutor

        if MPI.COMM_WORLD.Get_size() == 1:  # the launcher belongs to another MPI than mpi4py
            require_single_process("prepare all of the corpus", BY_MPI)
        with MPICommExecutor(MPI.COMM_WORLD, root=0) as executor:
            yield None if executor is None else Workers(executor, ranks - 1)
        return
    require_single_process("prepare all of the corpus", BY_MPI)
    count = count or len(os.sched_getaffinity(0))
    if count == 1:
        yield Workers(None, 1)
        return
    # spawn: forking a process whose libraries have started threads can deadlock the child
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, mp_context=context, initializer=_end_with, initargs=(os.getpid(),)) as executor:
        yield Workers(executor, count)


def _end_with(parent: int) -> None:
    """Make this worker end soon after its parent.

    Otherwise a pool whose parent was killed would wait for work forever.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
