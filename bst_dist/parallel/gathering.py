"""Waiting until every rank of a job is there, with the missing ones named.

torch waits for them too, in silence and for ten minutes or more; and a signal that comes meanwhile is not obeyed.
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

LIMIT_S = 300.0
"""How long all ranks may take to come together."""
FIRST_WORD_S, NEXT_WORD_S = 10.0, 30.0
"""After how long it is said who is missing, and then how often."""
POLL_S = 0.1


class GatheringError(RuntimeError):
    """Some ranks did not come."""


@contextmanager
def gathered(environment: Mapping[str, str] = os.environ, limit_s: float = LIMIT_S) -> Iterator[None]:
    """Wait for all ranks that `environment` speaks of; the store in which they meet stays open while the block runs.

    Nothing happens where the variables of `torch.distributed` are not set: MPI brings its processes together itself.
    Raises GatheringError after `limit_s`, naming who is missing, and at once when rank 0's port is taken.
    """
    needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if any(name not in environment for name in needed) or environment["WORLD_SIZE"] == "1":
        yield
        return
    rank, world = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    address, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    where, deadline = with_port(address, port), time.monotonic() + limit_s
    # torchrun's agent holds the store of its ranks, which outlives a restart of theirs.
    agent_holds_it = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    prefix = f"gathered/{environment.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    with _saying(f"waiting for rank 0 at {where}", rank):
        try:
            # multi_tenant: torch's own store, which follows on the same port, is then this one.
            store = TCPStore(address, port, world, rank == 0 and not agent_holds_it, timedelta(seconds=limit_s),
                             wait_for_workers=False, multi_tenant=True)  # fmt: skip
            store.set(f"{prefix}/{rank}", socket.gethostname())
        except (DistStoreError, RuntimeError) as error:
            if rank == 0 and "EADDRINUSE" in str(error):
                raise GatheringError(_taken(port)) from None
            reason = str(error).splitlines()[0]
            raise GatheringError(f"rank {rank} found no rank 0 at {where} within {limit_s:g} s: {reason}") from None
    if rank == 0:
        _await_others(store, prefix, world, where, deadline)
        store.set(f"{prefix}/all", "")
    else:
        _await_first(store, prefix, where, deadline)
    yield


def _await_others(store: TCPStore, prefix: str, world: int, where: str, deadline: float) -> None:
    """Rank 0: until all have come; says who has not."""
    missing, next_word = list(range(1, world)), time.monotonic() + FIRST_WORD_S
    while missing := [rank for rank in missing if not store.check([f"{prefix}/{rank}"])]:
        now = time.monotonic()
        if now > deadline:
            raise GatheringError(f"gave up {_waiting(missing, where)}")
        if now > next_word:
            next_word = now + NEXT_WORD_S
            _say(_waiting(missing, where))
        time.sleep(POLL_S)


def _await_first(store: TCPStore, prefix: str, where: str, deadline: float) -> None:
    """Another rank: until rank 0 says that all have come, or is gone."""
    left_s = deadline - time.monotonic() + 5.0  # rank 0 gives up first, and names the missing
    try:
        store.wait([f"{prefix}/all"], timedelta(seconds=max(1.0, left_s)))
    except (DistStoreError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise GatheringError(f"not all ranks came together at {where}: {reason}") from None


def _taken(port: int) -> str:
    """That another process listens where rank 0 should, and what to do."""
    return (
        f"port {port} of {socket.gethostname()}, where all ranks are to meet, is taken by {_listener(port)}: does "
        "another run train here? Choose another port: --master-port (bst launch, torchrun), --master_port (deepspeed), "
        "--master ADDRESS:PORT (bst train --nodes), or MASTER_PORT where the environment names it"
    )


def _listener(port: int) -> str:
    """The process that listens on a port of this host, as far as this user may know it."""
    try:
        listening = [one for one in psutil.net_connections("tcp")
                     if one.status == psutil.CONN_LISTEN and one.laddr.port == port and one.pid]  # fmt: skip
        process = psutil.Process(listening[0].pid)
        return f"process {process.pid} ({shlex.join(process.cmdline())[:120]})"
    except (psutil.Error, OSError, IndexError):
        return "a process of another user"


def agreed_port() -> int:
    """Under mpirun, the port where all ranks meet: MASTER_PORT of rank 0, or one that is free on its host.

    Every process calls it. Without it DeepSpeed would have every start on a host meet at port 29500.
    """
    from mpi4py import MPI  # importing it starts MPI, which only processes of mpirun may

    own = int(os.environ.get("MASTER_PORT") or free_port()) if MPI.COMM_WORLD.Get_rank() == 0 else 0
    return MPI.COMM_WORLD.bcast(own)


def _waiting(missing: Sequence[int], where: str) -> str:
    return f"waiting for {len(missing)} rank{'s' * (len(missing) > 1)} at {where}: {spans(missing)}"


def spans(numbers: Sequence[int]) -> str:
    """Ascending numbers as ``1 to 3, 7``."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(first) if first == last else f"{first} to {last}" for first, last in parts)


@contextmanager
def _saying(text: str, rank: int) -> Iterator[None]:
    """Say what the block waits for when it takes long; one rank a host would do, but none knows the others yet."""
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
