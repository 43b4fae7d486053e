"""Which accelerator a process uses, found out before torch is imported.

Launchers number the processes of one host by a variable of their own; each takes the device of its number.
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
"""Variables that hold the number of a process on its host, in the order in which they are believed."""
CPU_ASKED_FOR = ("", "-1")
"""Values of CUDA_VISIBLE_DEVICES by which people ask for the CPU."""


def local_rank(environment: Mapping[str, str]) -> int | None:
    """The number of this process on its host; None when no launcher has given it one."""
    found = [environment[name] for name in LOCAL_RANKS if environment.get(name, "").isdigit()]
    return int(found[0]) if found else None


def device_files(root: Path = Path("/dev")) -> list[str]:
    """The accelerators whose device files this process sees: NVIDIA's, or AMD's compute device."""
    nvidia = [path.name for path in root.glob("nvidia*") if path.name.removeprefix("nvidia").isdigit()]
    amd = [path.name for path in root.glob("dri/renderD*")] if (root / "kfd").exists() else []
    return sorted([*nvidia, *amd])


def cpu_refusal(environment: Mapping[str, str], root: Path = Path("/dev")) -> str | None:
    """Why a process for which torch finds no accelerator must not compute on the CPU; None when it may."""
    if "DS_ACCELERATOR" in environment or environment.get("CUDA_VISIBLE_DEVICES") in CPU_ASKED_FOR:
        return None
    if not (found := device_files(root)):
        return None
    return (
        f"this host has {len(found)} accelerators ({found[0]}, ...), but torch can use none of them: is this torch a "
        "build for the CPU, or the driver too old? `bst doctor` looks further; DS_ACCELERATOR=cpu trains on the CPU"
    )
