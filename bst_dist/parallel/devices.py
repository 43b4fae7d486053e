"""Which accelerator a process uses, determined without torch.

Each launcher numbers the processes of one host in its own environment variable. A process uses the device with its
number.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

LOCAL_RANKS = (
    "LOCAL_RANK",  # torchrun, DeepSpeed and this project's launchers
    "OMPI_COMM_WORLD_LOCAL_RANK",  # Open MPI
    "MPI_LOCALRANKID",  # MPICH, Intel MPI
    "MV2_COMM_WORLD_LOCAL_RANK",  # MVAPICH
    "PALS_LOCAL_RANKID",  # HPE's launcher
    "SLURM_LOCALID",  # srun
)
"""Environment variables that hold the local rank of a process, in the order in which they are tried."""
CPU_ASKED_FOR = ("", "-1")
"""Values of CUDA_VISIBLE_DEVICES that select the CPU."""


def local_rank(environment: Mapping[str, str]) -> int | None:
    """Return the local rank of this process on its host; None if no launcher has set one."""
    found = [environment[name] for name in LOCAL_RANKS if environment.get(name, "").isdigit()]
    return int(found[0]) if found else None


def device_files(root: Path = Path("/dev")) -> list[str]:
    """Return the accelerators whose device files this process sees: NVIDIA's or AMD's."""
    nvidia = [path.name for path in root.glob("nvidia*") if path.name.removeprefix("nvidia").isdigit()]
    amd = [path.name for path in root.glob("dri/renderD*")] if (root / "kfd").exists() else []
    return sorted([*nvidia, *amd])


def cpu_refusal(environment: Mapping[str, str], root: Path = Path("/dev")) -> str | None:
    """Return why a process must not compute on the CPU although torch finds no accelerator; None if it may."""
    if "DS_ACCELERATOR" in environment or environment.get("CUDA_VISIBLE_DEVICES") in CPU_ASKED_FOR:
        return None
    if not (found := device_files(root)):
        return None
    return (
        f"this host has {len(found)} accelerators ({found[0]}, ...), but torch can use none of them: is this torch a "
        "build for the CPU, or the driver too old? `bst doctor` looks further; DS_ACCELERATOR=cpu trains on the CPU"
    )
