"""The process group of all ranks: this process's rank and device, and the small collectives outside model and ZeRO."""

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
from bst_base.launched import require_single_process
from bst_base.sizes import spans
from bst_dist.parallel.communication import record_deepspeed
from bst_dist.parallel.devices import cpu_refusal, local_rank
from bst_dist.parallel.interface import choose_gloo_interface
from bst_dist.parallel.numa import bind_to_device_node, pci_address
from bst_dist.parallel.phases import Phases
from bst_dist.parallel.rendezvous import agreed_port, gathered

T = TypeVar("T")

# If any of these is set, a launcher started this process as one of several.
_LAUNCHED = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK")


SEPARATE_PROCESSES_HINT = (
    "use `bst launch --launcher slurm`, `bst launch --launcher openmpi`, or give each process RANK, WORLD_SIZE, "
    "LOCAL_RANK, MASTER_ADDR and MASTER_PORT (under srun: RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS "
    "LOCAL_RANK=$SLURM_LOCALID)"
)


def _be_alone_without_launcher() -> None:
    """Let this process be the only rank if no launcher has started it."""
    if not any(name in os.environ for name in _LAUNCHED):
        require_single_process("train all of the run", SEPARATE_PROCESSES_HINT)
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        os.environ |= {**alone, "MASTER_PORT": str(free_port())}


def _limits(exchange_limit_s: float | None) -> dict[str, Any]:
    """Set what torch does with an exchange that hangs; return the arguments that DeepSpeed passes on to torch."""
    options: dict[str, Any] = {}
    if exchange_limit_s is not None:
        options = {"timeout": timedelta(seconds=exchange_limit_s)}
        # The timeout of NCCL's heartbeat monitor, which does not follow from the timeout of exchanges.
        os.environ.setdefault("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", f"{exchange_limit_s:.0f}")
    # Keep torch's flight recorder for jobs that hang, and write it when NCCL times out.
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", os.environ.get("TORCH_NCCL_TRACE_BUFFER_SIZE", "2000"))
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    return options


class Ranks:
    """The process group of all ranks, for any launcher that started this process.

    Without a launcher, the group consists of this process.
    """

    def __init__(self, exchange_limit_s: float | None = None) -> None:
        """`exchange_limit_s`: torch ends the process after this time in one exchange; None: the default of torch and
        DeepSpeed."""
        require_accelerator()
        # The accelerator must be chosen before DeepSpeed is imported, because it looks for one at import.
        choose_accelerator()
        from bst_dist.parallel.deepspeed_import import deepspeed

        accelerator = deepspeed.accelerator.get_accelerator()
        if accelerator.device_name() == "cpu":
            # Otherwise DeepSpeed tries its C++ extensions one by one and compiles an all-reduce that only its inference
            # uses. This takes minutes at the first start. If it is killed, its lock blocks the next start.
            deepspeed.ops.__compatible_ops__ = {}
        _be_alone_without_launcher()
        # Set the device before DeepSpeed initialises the group: under mpirun it learns LOCAL_RANK only from MPI, and by
        # then every process would have taken the first device.
        device = None if accelerator.device_name() == "cpu" else own_device(accelerator.device_count())
        if device is not None:
            accelerator.set_device(device)
        self.numa_node = bind_to_device_node(pci_of_device() if accelerator.device_name() == "cuda" else None)
        """The NUMA node of the device, to whose cores this process is bound; None if it is not bound."""
        options = _limits(exchange_limit_s)
        if "RANK" not in os.environ:  # DeepSpeed will ask MPI
            options["distributed_port"] = agreed_port()
        if device is not None and device != (local_rank(os.environ) or 0):
            if "RANK" not in os.environ:  # first, because it would overwrite the values set below
                deepspeed.comm.comm.mpi_discovery(options["distributed_port"], verbose=False)
            number_by_device(device)
        choose_gloo_interface()  # on CPUs for all exchanges
        with gathered():
            deepspeed.init_distributed(verbose=False, **options)
        choose_gloo_interface()  # for the group of local copies, where DeepSpeed has found rank 0's host by MPI
        self.rank = distributed.get_rank()
        self.world = distributed.get_world_size()
        self.device = torch.device(accelerator.current_device_name())
        on_cpu = accelerator.device_name() == "cpu"
        self._allocated = None if on_cpu else accelerator.max_memory_allocated
        self.phases = Phases(None if on_cpu else accelerator.synchronize)
        """The current phase of this rank, the time of each phase, and the bytes sent."""
        record_deepspeed(self.phases)

    def limit_exchanges(self, seconds: float | None) -> None:
        """Set the timeout of exchanges in all process groups made so far; None changes nothing."""
        if seconds is None:
            return
        for group in distributed.distributed_c10d._world.pg_map:
            distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which prints and writes for all."""
        return self.rank == 0

    def print_first(self, text: str) -> None:
        """Print a line on rank 0."""
        if self.first:
            print(text, flush=True)

    @property
    def cores(self) -> str:
        """The CPU cores that this process may use, as bound by the launcher or scheduler."""
        return spans(sorted(os.sched_getaffinity(0)))

    @property
    def threads(self) -> int:
        """Number of threads that torch computes with."""
        return torch.get_num_threads()

    def all_reduce_numbers(self, values: Sequence[float]) -> list[float]:
        """Return the sums over all ranks, in float64, so that counts of tokens and bytes stay exact."""
        totals = torch.tensor(values, dtype=torch.float64, device=self.device)
        with self.phases.exchanging("sum of numbers"):
            distributed.all_reduce(totals)
            return totals.tolist()

    def all_reduce(self, values: Tensor) -> Tensor:
        """Sum a tensor over all ranks, in place and without waiting for the device."""
        with self.phases.exchanging("sum of numbers"):
            distributed.all_reduce(values)
        return values

    def all_gather_numbers(self, values: Sequence[float]) -> Tensor:
        """Return every rank's `values` on every rank, (ranks, n) float64 on the host. All ranks give equally many.

        It is one collective of numbers, far cheaper than `all_gather_object`, which pickles.
        """
        own = torch.tensor(values, dtype=torch.float64, device=self.device)
        found = torch.empty(self.world * len(values), dtype=torch.float64, device=self.device)
        with self.phases.exchanging("table of numbers"):
            distributed.all_gather_into_tensor(found, own)
            return found.view(self.world, -1).cpu()

    def all_gather_object(self, value: T) -> list[T]:
        """Return every rank's value, ordered by rank, on every rank."""
        values: list[Any] = [None] * self.world
        with self.phases.exchanging("gather of objects"):
            distributed.all_gather_object(values, value)
        return values

    def broadcast_object(self, value: T) -> T:
        """Return rank 0's value on every rank."""
        values = [value]
        with self.phases.exchanging("broadcast of an object"):
            distributed.broadcast_object_list(values, src=0)
        return values[0]

    def barrier(self) -> None:
        """Wait for all ranks."""
        with self.phases.exchanging("barrier"):
            distributed.barrier()

    def memory_high_water(self) -> int:
        """Return the peak memory of this rank in bytes: on its accelerator, or in host memory if there is none."""
        if self._allocated is not None:
            return self._allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def leave(self) -> None:
        """Leave the process group. Without this, the exit of one rank may look like a failure to the others."""
        distributed.destroy_process_group()
        # DeepSpeed found the ranks by MPI, and mpirun treats an exit without Finalize as a failure.
        if "mpi4py.MPI" in sys.modules:
            sys.modules["mpi4py.MPI"].Finalize()


def own_device(count: int) -> int:
    """Return the device index of this process among the `count` that it sees. Raise UserError if there are too few.

    If the launcher shows each process only its own device (Slurm's --gpus-per-task=1), the index is 0. With
    LOCAL_WORLD_SIZE, one launching process has started all of them, and all see the same devices.
    """
    number = local_rank(os.environ) or 0
    if count == 1 and os.environ.get("LOCAL_WORLD_SIZE", "1") == "1":
        return 0
    if number >= count:
        visible = f"{count} {'is' if count == 1 else 'are'} visible to it"
        raise UserError(f"process {number} of this host has no accelerator of its own: {visible}")
    return number


def number_by_device(device: int) -> None:
    """Make DeepSpeed use this device. It reads LOCAL_RANK as the device index, and Open MPI's variable must agree."""
    for name in ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"):
        if name in os.environ:
            os.environ[name] = str(device)


def pci_of_device() -> str | None:
    """Return the PCI address of this process's CUDA device; None if torch does not give it."""
    return pci_address(torch.cuda.get_device_properties(torch.cuda.current_device()))


def require_accelerator() -> None:
    """Raise UserError if torch finds no accelerator although this host has some, and the CPU was not requested."""
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None and (refusal := cpu_refusal(os.environ)) is not None:
        raise UserError(f"{socket.gethostname()}: {refusal}")


def choose_accelerator() -> None:
    """Make DeepSpeed use the CPU on a machine without an accelerator, unless the environment says otherwise."""
    if torch.accelerator.current_accelerator(check_available=True) is None:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
