"""The hosts of a job and the number of ranks on each, from a hostfile or a Slurm allocation."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bst_base.errors import UserError


@dataclass(frozen=True)
class Host:
    """A machine, with the name that the launcher uses for it."""

    name: str
    slots: int
    """Maximum number of ranks: usually its accelerators; on a CPU, ranks share its cores."""
    devices: str | None = None
    """The accelerators that the ranks see, as in CUDA_VISIBLE_DEVICES; None: all."""
    slurm_node: str | None = None
    """The host's NodeName, if Slurm gave it."""

    @property
    def address(self) -> str:
        """The network name: the name without a user."""
        return self.name.rpartition("@")[2]

    @property
    def node(self) -> str:
        """Slurm's name of the host; if Slurm did not give it, the name without user and domain."""
        short = self.address if _IS_ADDRESS.fullmatch(self.address) else self.address.partition(".")[0]
        return self.slurm_node or short


_IS_ADDRESS = re.compile(r"[\d.]+|.*:.*")
_LINE = re.compile(
    r"(?P<name>[^\s=]+)(?:\s+slots\s*=\s*(?P<slots>[1-9]\d*))?"
    r"(?:\s+max[-_]slots\s*=\s*(?P<most>[1-9]\d*))?(?:\s+devices\s*=\s*(?P<devices>[\w,:/-]+))?"
)


class HostError(UserError):
    """An invalid list of hosts, or a host that a job cannot use."""


def read_hostfile(path: Path) -> list[Host]:
    """Read the hosts of a file with lines ``name slots=N``, as DeepSpeed and Open MPI do; # begins a comment.

    ``max-slots=N`` alone counts as slots; together with ``slots`` it is their maximum. A name alone is one slot, and
    each repetition adds one (schedulers write such lists). ``devices=0,1`` after the slots chooses accelerators. Raises
    HostError for any other line, for a host listed twice with slots, and for a file without hosts.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise HostError(f"{path}: cannot be read: {error.strerror}") from None
    hosts: dict[str, Host] = {}
    bare: set[str] = set()
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        host, counts = _host(text, f"{path}:{number}")
        if host.name in hosts and not (counts and host.name in bare):
            raise HostError(f"{path}:{number}: {host.name} is listed twice: give it one line with all its slots")
        before = hosts[host.name].slots if host.name in hosts else 0
        hosts[host.name] = Host(host.name, host.slots + before, host.devices)
        bare |= {host.name} if counts else set()
    if not hosts:
        raise HostError(f"{path}: no host in it: write a line `name slots=RANKS` for each")
    return list(hosts.values())


def _host(text: str, where: str) -> tuple[Host, bool]:
    """Return the host of one line, and whether the line is only a name; raises HostError, beginning with `where`."""
    found = _LINE.fullmatch(text)
    if found is None:
        raise HostError(f"{where}: {text!r} is not a host: write `name slots=RANKS`, after it devices=0,1 if need be")
    limits = [int(found[part]) for part in ("slots", "most") if found[part]]
    devices = found["devices"]
    slots = min(limits, default=len(devices.split(",")) if devices else 1)
    if devices and slots > len(devices.split(",")):
        raise HostError(f"{where}: {slots} slots, but {len(devices.split(','))} devices ({devices}): one for each rank")
    return Host(found["name"], slots, devices), not limits and not devices


def slurm_hosts(environment: Mapping[str, str] = os.environ) -> list[Host]:
    """Return the hosts of the Slurm allocation that this process runs in, with one slot per task.

    If every node has one task, each of its accelerators is a slot: jobs that start their own processes request one
    task. Raises HostError outside an allocation.
    """
    if "SLURM_JOB_NODELIST" not in environment:
        raise HostError("not inside a Slurm allocation (no SLURM_JOB_NODELIST): use sbatch, or give --hostfile")
    names, tasks = _slurm_names(environment["SLURM_JOB_NODELIST"]), slurm_tasks(environment)
    if len(tasks) != len(names):
        said = environment.get("SLURM_TASKS_PER_NODE", "1")
        raise HostError(f"SLURM_TASKS_PER_NODE {said!r} is for {len(tasks)} nodes, but the allocation has {len(names)}")
    slots = [_slurm_accelerators(environment)] * len(tasks) if set(tasks) == {1} else tasks
    return [Host(name, count, slurm_node=name) for name, count in zip(names, slots, strict=True)]


def _slurm_names(nodes: str) -> list[str]:
    """Return the names in Slurm's list of nodes, such as ``n[1-3]``; raises HostError when scontrol cannot."""
    command = ["scontrol", "show", "hostnames", nodes]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    except subprocess.CalledProcessError as error:
        why = f"{' '.join(command)}: {error.stderr.strip() or f'status {error.returncode}'}"
    except FileNotFoundError:
        why = "scontrol is not on the PATH"
    raise HostError(
        f"the nodes of this Slurm allocation are not known: {why}; start outside of the container, or give --hostfile"
    )


def _slurm_accelerators(environment: Mapping[str, str]) -> int:
    """Return the accelerators of a node with one task; 1 if none were requested, or if Slurm gives no single number."""
    for each in ("PER_NODE", "ON_NODE", "PER_TASK"):
        found = re.fullmatch(r"(?:[^,]+:)?(\d+)", environment.get(f"SLURM_GPUS_{each}", ""))  # 8, or a100-sxm4-80gb:8
        if found:
            return max(1, int(found[1]))
    return 1


def slurm_tasks(environment: Mapping[str, str]) -> list[int]:
    """Return the tasks of each node, from Slurm's ``2(x3),1``."""
    text = environment.get("SLURM_TASKS_PER_NODE", "1")
    tasks: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if found is None:
            raise HostError(f"SLURM_TASKS_PER_NODE is {text!r}, which does not say how many tasks a node has")
        tasks += [int(found[1])] * int(found[2] or 1)
    return tasks
