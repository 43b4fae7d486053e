"""This process among all: its rank, its device, and the few small collectives that are not the model's or ZeRO's."""

from __future__ import annotations

import os
import resource
import socket
import sys
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from bst_base.errors import UserError
from bst_base.host import free_port
from bst_base.launched import require_alone
from bst_dist.parallel.communication import watch_deepspeed
from bst_dist.parallel.devices import cpu_refusal, local_rank
from bst_dist.parallel.gathering import agreed_port, gathered, spans
from bst_dist.parallel.numa import bind_near, pci_address
from bst_dist.parallel.phases import Phases

T = TypeVar("T")

# Any of these says that a launcher started this process as one of several.
_LAUNCHED = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK")


RANKS_OF_ITS_OWN = (
    "use `bst launch --launcher slurm`, `bst launch --launcher openmpi`, or give each process RANK, WORLD_SIZE, "
    "LOCAL_RANK, MASTER_ADDR and MASTER_PORT (under srun: RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS "
    "LOCAL_RANK=$SLURM_LOCALID)"
)


class Ranks:
    """The process group of all ranks, joined by whichever launcher started this process.

    Started by none, the process is a group of its own.
    """

    def __init__(self, exchange_limit_s: float | None = None) -> None:
        """`exchange_limit_s`: after so long in one exchange torch ends the process; None: as torch and DeepSpeed have
        it."""
        require_accelerator()
        # The accelerator must be known before DeepSpeed is imported: it looks for one at import.
        choose_accelerator()
        from bst_dist.parallel.loading import deepspeed

        accelerator = deepspeed.accelerator.get_accelerator()
        if accelerator.device_name() == "cpu":
            # DeepSpeed would try its C++ extensions one by one, and compile an all-reduce that only its inference uses:
            # minutes at the first start, and a start killed meanwhile leaves a lock that the next one waits for.
            deepspeed.ops.__compatible_ops__ = {}
        if not any(name in os.environ for name in _LAUNCHED):
            require_alone("train all of the run", RANKS_OF_ITS_OWN)
            alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
            os.environ |= {**alone, "MASTER_PORT": str(free_port())}
        # Before DeepSpeed joins the ranks: under mpirun it learns LOCAL_RANK only from MPI, when every process would
        # have taken the first device already.
        device = None if accelerator.device_name() == "cpu" else own_device(accelerator.device_count())
        if device is not None:
            accelerator.set_device(device)
        self.numa_node = bind_near(pci_of_device() if accelerator.device_name() == "cuda" else None)
        """Whose cores this process was bound to, because its device belongs to it; None when it was not."""
        options: dict[str, Any] = {}
        if exchange_limit_s is not None:
            options = {"timeout": timedelta(seconds=exchange_limit_s)}
            # NCCL's own watch over its thread, which does not follow from the time limit of exchanges.
            os.environ.setdefault("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", f"{exchange_limit_s:.0f}")
        # torch's flight recorder is there to be read when a job hangs, and is written when NCCL gives up by itself.
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", os.environ.get("TORCH_NCCL_TRACE_BUFFER_SIZE", "2000"))
        os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
        if "RANK" not in os.environ:  # DeepSpeed will ask MPI
            options["distributed_port"] = agreed_port()
        if device is not None and device != (local_rank(os.environ) or 0):
            if "RANK" not in os.environ:  # or its answer would take the place of what is said here
                deepspeed.comm.comm.mpi_discovery(options["distributed_port"], verbose=False)
            number_by_device(device)
        with gathered():
            deepspeed.init_distributed(verbose=False, **options)
        self.rank = distributed.get_rank()
        self.world = distributed.get_world_size()
        self.device = torch.device(accelerator.current_device_name())
        on_cpu = accelerator.device_name() == "cpu"
        self._allocated = None if on_cpu else accelerator.max_memory_allocated
        self.phases = Phases(None if on_cpu else accelerator.synchronize)
        """Where this rank is, what its time goes to and what it sends."""
        watch_deepspeed(self.phases)

    def limit_exchanges(self, seconds: float | None) -> None:
        """Let torch wait so long for an exchange in any group of ranks made so far; None changes nothing."""
        for group in distributed.distributed_c10d._world.pg_map if seconds is not None else ():
            distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which prints and writes for all."""
        return self.rank == 0

    def say(self, text: str) -> None:
        """Print a line, once for all ranks."""
        if self.first:
            print(text, flush=True)

    @property
    def cores(self) -> str:
        """The processor cores that this process may use, as the launcher or scheduler has bound it."""
        return spans(sorted(os.sched_getaffinity(0)))

    @property
    def threads(self) -> int:
        """That torch computes with on them."""
        return torch.get_num_threads()

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over all ranks, in float64: counts of tokens and bytes stay exact."""
        totals = torch.tensor(values, dtype=torch.float64, device=self.device)
        with self.phases.exchanging("sum of numbers"):
            distributed.all_reduce(totals)
            return totals.tolist()

    def add_up(self, values: Tensor) -> Tensor:
        """The same of a tensor, in place and without waiting for the device to have the sums."""
        with self.phases.exchanging("sum of numbers"):
            distributed.all_reduce(values)
        return values

    def table(self, values: Sequence[float]) -> Tensor:
        """(ranks, n) float64 on the host: every rank's `values`, on every rank; all ranks give as many.

        One collective of numbers: where they are enough it is far cheaper than `gather`, which pickles.
        """
        own = torch.tensor(values, dtype=torch.float64, device=self.device)
        found = torch.empty(self.world * len(values), dtype=torch.float64, device=self.device)
        with self.phases.exchanging("table of numbers"):
            distributed.all_gather_into_tensor(found, own)
            return found.view(self.world, -1).cpu()

    def gather(self, value: T) -> list[T]:
        """Every rank's value, by rank, on every rank."""
        values: list[Any] = [None] * self.world
        with self.phases.exchanging("gather of objects"):
            distributed.all_gather_object(values, value)
        return values

    def from_first(self, value: T) -> T:
        """Rank 0's value."""
        values = [value]
        with self.phases.exchanging("broadcast of an object"):
            distributed.broadcast_object_list(values, src=0)
        return values[0]

    def barrier(self) -> None:
        """Wait for all ranks."""
        with self.phases.exchanging("barrier"):
            distributed.barrier()

    def memory_high_water(self) -> int:
        """Most bytes that this rank has held: on its accelerator, or of the machine's memory where there is none."""
        if self._allocated is not None:
            return self._allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def leave(self) -> None:
        """Leave the process group; without this the exit of one rank may look like a fault to the others."""
        distributed.destroy_process_group()
        # DeepSpeed has found the ranks by MPI, and mpirun takes an exit without this for a fault.
        if "mpi4py.MPI" in sys.modules:
            sys.modules["mpi4py.MPI"].Finalize()


def own_device(count: int) -> int:
    """The device of this process among the `count` that it sees; raises UserError when there are too few.

    Where a launcher shows each process one device of its own (Slurm's --gpus-per-task=1), that is device 0.
    """
    number = local_rank(os.environ) or 0
    if count == 1 and number > 0:
        return 0
    if number >= count:
        raise UserError(f"process {number} of this host has no accelerator of its own: {count} are visible to it")
    return number


def number_by_device(device: int) -> None:
    """Let DeepSpeed take this device: it takes LOCAL_RANK for a device's number, and Open MPI's word must agree."""
    for name in ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"):
        if name in os.environ:
            os.environ[name] = str(device)


def pci_of_device() -> str | None:
    """Where this process's CUDA device is; None where torch does not say."""
    return pci_address(torch.cuda.get_device_properties(torch.cuda.current_device()))


def require_accelerator() -> None:
    """Raise UserError where torch finds no accelerator though this host has some, and nobody asked for the CPU."""
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None and (refusal := cpu_refusal(os.environ)) is not None:
        raise UserError(f"{socket.gethostname()}: {refusal}")


def choose_accelerator() -> None:
    """Make DeepSpeed use the CPU on a machine without an accelerator, unless the environment says otherwise."""
    if torch.accelerator.current_accelerator(check_available=True) is None:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
