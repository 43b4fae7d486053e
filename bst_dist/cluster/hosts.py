"""The hosts of a job, and how many ranks each may run."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bst_base.errors import UserError


@dataclass(frozen=True)
class Host:
    """A machine by the name that the launcher reaches it by."""

    name: str
    slots: int
    """Ranks it may run: its accelerators, or as many as its cores are shared by."""


class HostError(UserError):
    """A list of hosts that no job can be started on."""


def read_hostfile(path: Path) -> list[Host]:
    """Hosts of a file of lines ``name slots=N``, as DeepSpeed and Open MPI read it; # begins a comment.

    Raises HostError for a line that is something else, a host named twice, or no host at all.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise HostError(f"{path}: cannot be read: {error.strerror}") from None
    hosts: dict[str, Host] = {}
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        found = re.fullmatch(r"(\S+)\s+slots\s*=\s*([1-9]\d*)", text)
        if found is None:
            raise HostError(f"{path}:{number}: {text!r} is not a host: write `name slots=RANKS`")
        if found[1] in hosts:
            raise HostError(f"{path}:{number}: {found[1]} stands there twice: give it one line with all its slots")
        hosts[found[1]] = Host(found[1], int(found[2]))
    if not hosts:
        raise HostError(f"{path}: names no host: write a line `name slots=RANKS` for each")
    return list(hosts.values())


def slurm_hosts(environment: Mapping[str, str] = os.environ) -> list[Host]:
    """The hosts of the Slurm allocation that this process runs in, with a slot for each task that it asked for.

    Raises HostError outside an allocation.
    """
    if "SLURM_JOB_NODELIST" not in environment:
        raise HostError("not inside a Slurm allocation (no SLURM_JOB_NODELIST): use sbatch, or give --hostfile")
    command = ["scontrol", "show", "hostnames", environment["SLURM_JOB_NODELIST"]]
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    slots = _slurm_slots(environment.get("SLURM_TASKS_PER_NODE", "1"), len(names))
    return [Host(name, count) for name, count in zip(names, slots, strict=True)]


def _slurm_slots(tasks: str, nodes: int) -> Sequence[int]:
    """Slurm's ``2(x3),1`` as a number for each node."""
    slots: list[int] = []
    for part in tasks.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if found is None:
            raise HostError(f"SLURM_TASKS_PER_NODE is {tasks!r}, which names no number of tasks for each node")
        slots += [int(found[1])] * int(found[2] or 1)
    if len(slots) != nodes:
        raise HostError(f"SLURM_TASKS_PER_NODE {tasks!r} speaks of {len(slots)} nodes, the allocation has {nodes}")
    return slots
