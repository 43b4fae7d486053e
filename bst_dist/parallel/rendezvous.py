"""Waiting until all ranks of a job have started, and naming the missing ones.

torch waits for them too, but silently and for ten minutes or more, and it does not react to signals meanwhile.
"""

from __future__ import annotations

import os
import shlex
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta

import psutil
from torch.distributed import DistStoreError, TCPStore

from bst_base.host import free_port, with_port
from bst_base.sizes import counted, ranks_in_words, spans

LIMIT_S = 300.0
"""Timeout for all ranks to start."""
FIRST_WORD_S, NEXT_WORD_S = 10.0, 30.0
"""Time until the first message about missing ranks, and the interval of later messages."""
POLL_S = 0.1


class GatheringError(RuntimeError):
    """Some ranks did not start in time, or rank 0's port is taken."""


@contextmanager
def gathered(environment: Mapping[str, str] = os.environ, limit_s: float = LIMIT_S) -> Iterator[None]:
    """Wait for all ranks described by `environment`. The store to which they connect stays open while the block runs.

    If the variables of `torch.distributed` are not set, do nothing: MPI connects its processes itself. Raise
    GatheringError after `limit_s`, naming the missing ranks, or at once if rank 0's port is taken.
    """
    needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if any(name not in environment for name in needed) or environment["WORLD_SIZE"] == "1":
        yield
        return
    rank, world = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    address = environment["MASTER_ADDR"]
    port = int(environment["MASTER_PORT"])
    where = with_port(address, port)
    deadline = time.monotonic() + limit_s
    # torchrun's agent hosts the store of its ranks, so the store survives a restart of the ranks.
    agent_holds_it = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    prefix = f"gathered/{environment.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    with _saying(f"waiting for rank 0 at {where}", rank):
        try:
            # multi_tenant: torch's own store, opened later on the same port, then shares this one.
            store = TCPStore(
                address,
                port,
                world,
                rank == 0 and not agent_holds_it,
                timedelta(seconds=limit_s),
                wait_for_workers=False,
                multi_tenant=True,
            )
            store.set(f"{prefix}/{rank}", socket.gethostname())
        except (DistStoreError, RuntimeError) as error:
            serves = rank == 0 and not agent_holds_it
            raise GatheringError(_unconnected(rank, serves, where, port, limit_s, error)) from None
    if rank == 0:
        _await_others(store, prefix, world, where, limit_s, deadline)
        store.set(f"{prefix}/all", "")
    else:
        _await_first(store, prefix, where, deadline)
    yield


def _await_others(store: TCPStore, prefix: str, world: int, where: str, limit_s: float, deadline: float) -> None:
    """On rank 0: wait until all ranks have come, and print the missing ones."""
    missing = list(range(1, world))
    next_word = time.monotonic() + FIRST_WORD_S
    while missing := [rank for rank in missing if not store.check([f"{prefix}/{rank}"])]:
        now = time.monotonic()
        if now > deadline:
            raise GatheringError(
                f"{ranks_in_words(missing)} did not connect to {where} within {limit_s:g} s: see the output of these "
                "ranks, and whether a firewall blocks that port"
            )
        if now > next_word:
            next_word = now + NEXT_WORD_S
            _say(_waiting(missing, where))
        time.sleep(POLL_S)


def _await_first(store: TCPStore, prefix: str, where: str, deadline: float) -> None:
    """On other ranks: wait until rank 0 reports that all have come. Raise GatheringError if it does not."""
    left_s = deadline - time.monotonic() + 5.0  # rank 0 gives up first, and names the missing
    try:
        store.wait([f"{prefix}/all"], timedelta(seconds=max(1.0, left_s)))
    except (DistStoreError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise GatheringError(f"not all ranks connected to {where}: {reason}") from None


def _unconnected(rank: int, serves: bool, where: str, port: int, limit_s: float, error: Exception) -> str:
    """Return the error message for a rank that cannot open the store. `serves`: it would have listened on the port."""
    if serves and "EADDRINUSE" in str(error):
        return _taken(port)
    reason = str(error).splitlines()[0]
    if serves:
        return f"rank 0 cannot listen on {where} (MASTER_ADDR, MASTER_PORT): {reason}"
    return (
        f"rank {rank} on {socket.gethostname()} cannot connect to {where}, the rendezvous of the ranks (MASTER_ADDR, "
        f"MASTER_PORT), within {limit_s:g} s: {reason}; did rank 0 start there, does a firewall block the port?"
    )


def _taken(port: int) -> str:
    """Return the error message for a port on which another process listens, with what to do."""
    return (
        f"port {port} of {socket.gethostname()}, the rendezvous port of the ranks, is taken by {_listener(port)}: does "
        "another run train here? Choose another port: --master-port (bst launch, torchrun), --master_port (deepspeed), "
        "--master ADDRESS:PORT (bst train --nodes), or MASTER_PORT where the environment names it"
    )


def _listener(port: int) -> str:
    """Describe the process that listens on a port of this host, as far as this user may see it."""
    try:
        listening = [
            one
            for one in psutil.net_connections("tcp")
            if one.status == psutil.CONN_LISTEN and one.laddr.port == port and one.pid
        ]
        process = psutil.Process(listening[0].pid)
        return f"process {process.pid} ({shlex.join(process.cmdline())[:120]})"
    except (psutil.Error, OSError, IndexError):
        return "a process that this user cannot see (another user's, or in another container)"


def agreed_port() -> int:
    """Return the rendezvous port of the ranks under mpirun: MASTER_PORT of rank 0, or a free port of its host.

    Every process must call it. Without it, DeepSpeed would use port 29500 for every start on a host.
    """
    from mpi4py import MPI  # its import initialises MPI, which only processes of mpirun may do

    own = int(os.environ.get("MASTER_PORT") or free_port()) if MPI.COMM_WORLD.Get_rank() == 0 else 0
    return MPI.COMM_WORLD.bcast(own)


def _waiting(missing: Sequence[int], where: str) -> str:
    return f"waiting for {counted(len(missing), 'rank')} at {where}: {spans(missing)}"


@contextmanager
def _saying(text: str, rank: int) -> Iterator[None]:
    """Print what the block waits for if it takes long. Every rank prints: they do not know each other yet."""
    done = threading.Event()

    def say() -> None:
        wait_s = FIRST_WORD_S
        while not done.wait(wait_s):
            _say(f"rank {rank} on {socket.gethostname()}: {text}")
            wait_s = NEXT_WORD_S

    threading.Thread(target=say, name="gathering", daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _say(text: str) -> None:
    print(f"bst train: {text}", file=sys.stderr, flush=True)
