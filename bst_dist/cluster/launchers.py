"""The command lines that start one agent on each host, through whatever starts processes there.

Each agent is told a key: the place of its host in the list, or under Slurm, which orders hosts its own way, what Slurm
calls the node.
"""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from bst_base.errors import UserError
from bst_dist.cluster.hosts import Host
from bst_dist.cluster.processes import route_to

SSH = ("ssh", *("-o", "BatchMode=yes"), *("-o", "ConnectTimeout=8"), *("-o", "ServerAliveInterval=15"))
# Where each launcher looks for options of the ssh that it starts: Open MPI's variable has changed its name.
_SSH_VARIABLES = {
    "pdsh": ("PDSH_SSH_ARGS_APPEND",),
    "openmpi": ("OMPI_MCA_plm_rsh_args", "PRTE_MCA_plm_ssh_args"),
    "mpich": ("HYDRA_LAUNCHER_EXTRA_ARGS",),
}
OVER_SSH = tuple(_SSH_VARIABLES)
# What srun must know of the job. All other variables of its name are options that the batch job was given
# (--gpus-per-task, --cpus-per-task, ...), which would give the one agent of a node what one rank was meant to have.
_SLURM_JOB = ("SLURM_CONF", "SLURM_JOB_ID", "SLURM_JOBID", "SLURM_CLUSTERS", "SLURM_CLUSTER_NAME")


def pdsh(hosts: Sequence[Host], directory: Path, agent: Sequence[str]) -> list[str]:
    """Over ssh, all hosts at once."""
    names = ",".join(host.name for host in hosts)
    line = f"cd {shlex.quote(str(directory))} && exec {shlex.join(agent)} --key "
    return ["pdsh", "-R", "ssh", "-S", "-N", "-f", str(len(hosts)), "-w", names, line.replace("%", "%%") + "%n"]


def openmpi(hosts: Sequence[Host], directory: Path, agent: Sequence[str]) -> list[str]:
    """Open MPI's daemons, over ssh or a scheduler that they know; the agents are no MPI programs.

    Unbound: Open MPI would give each agent, and with it all its ranks, a single core.
    """
    _refuse_users(hosts)
    command = ["mpirun", *(["--allow-run-as-root"] if os.geteuid() == 0 else []), "--bind-to", "none"]
    start = ["-n", "1", "--wdir", str(directory), *agent, "--key"]
    return command + _joined([["--host", host.name, *start, str(key)] for key, host in enumerate(hosts)])


def mpich(hosts: Sequence[Host], directory: Path, agent: Sequence[str]) -> list[str]:
    """MPICH's process manager, Hydra, over ssh."""
    _refuse_users(hosts)
    names = ",".join(host.name for host in hosts)
    parts = [["-n", "1", *agent, "--key", str(key)] for key in range(len(hosts))]  # one a host, in their order
    # Hydra's daemons call back by this machine's name, which other hosts need not know.
    here = ["-localhost", address] if (address := route_to(hosts[0].address)) else []
    common = ["-launcher", "ssh", *here, "-hosts", names, "-ppn", "1", "-wdir", str(directory)]
    return ["mpiexec.hydra", *common, *_joined(parts)]


def slurm(hosts: Sequence[Host], directory: Path, agent: Sequence[str]) -> list[str]:
    """A step of the allocation, with all cores and accelerators that the job has on each node, unbound."""
    names = ",".join(host.node for host in hosts)
    nodes = [f"--nodes={len(hosts)}", f"--ntasks={len(hosts)}", "--ntasks-per-node=1", f"--nodelist={names}"]
    whole = ["--overlap", "--cpu-bind=none", "--mpi=none", *_all_accelerators(hosts, os.environ)]
    return ["srun", *nodes, *whole, "--no-kill", "--kill-on-bad-exit=0", f"--chdir={directory}", *agent]


def _all_accelerators(hosts: Sequence[Host], environment: Mapping[str, str]) -> list[str]:
    """For srun: the accelerators of all ranks of a node, where the job has asked for so many a task.

    The step has one task a node and would get those of one. What a job asks for by node, or in all, a step gets whole.
    """
    of_task = environment.get("SLURM_GPUS_PER_TASK", "").rpartition(":")[2]
    slots = {host.slots for host in hosts}
    return [f"--gpus-per-node={int(of_task) * slots.pop()}"] if of_task.isdigit() and len(slots) == 1 else []


def local(hosts: Sequence[Host], directory: Path, agent: Sequence[str]) -> list[str]:
    """This machine alone: for restarts where nothing else makes them."""
    if len(hosts) > 1:
        raise UserError(f"--launcher local: {len(hosts)} hosts, but it starts ranks on this machine alone")
    return [*agent, "--key", "0"]


LAUNCHERS: dict[str, Callable[[Sequence[Host], Path, Sequence[str]], list[str]]] = {
    "pdsh": pdsh,
    "openmpi": openmpi,
    "mpich": mpich,
    "slurm": slurm,
    "local": local,
}
_PROGRAMS = {
    "pdsh": {"pdsh": "pdsh", "ssh": "openssh-client"},
    "openmpi": {"mpirun": "openmpi-bin", "ssh": "openssh-client"},
    "mpich": {"mpiexec.hydra": "mpich", "ssh": "openssh-client"},
    "slurm": {"srun": "slurm-client"},
}
"""What each needs here, and Debian's package of it."""


def keys(launcher: str, hosts: Sequence[Host]) -> dict[str, str]:
    """The hosts' names by the keys of their agents."""
    return {host.node if launcher == "slurm" else str(place): host.name for place, host in enumerate(hosts)}


def require(launcher: str) -> None:
    """Raise UserError when the launcher, or the ssh that it uses, is not installed here."""
    for program, package in _PROGRAMS.get(launcher, {}).items():
        if shutil.which(program) is None:
            raise UserError(f"--launcher {launcher}: {program} is not on the PATH; Debian has it in {package}")


def command(launcher: str, hosts: Sequence[Host], directory: Path, agent: Sequence[str]) -> list[str]:
    """The whole command; raises UserError when the launcher is not installed."""
    require(launcher)
    line = LAUNCHERS[launcher](hosts, directory, agent)
    # Open MPI looks for its daemon on the other hosts beside an mpirun that is named by its whole path.
    return [shutil.which(line[0]) or line[0], *line[1:]]


def environment(launcher: str, ssh_port: int | None, given: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What the launcher finds in its environment."""
    if launcher == "slurm":
        return {name: value for name, value in given.items()
                if not name.startswith(("SLURM_", "SRUN_")) or name in _SLURM_JOB}  # fmt: skip
    options = shlex.join([*SSH[1:], *_port(ssh_port)])
    variables = _SSH_VARIABLES.get(launcher, ())
    return {**given, **{name: f"{options} {given.get(name, '')}".strip() for name in variables}}


def ssh(launcher: str, ssh_port: int | None, given: Mapping[str, str] = os.environ) -> list[str]:
    """An ssh that reaches a host as the launcher's does: with the options that the user has given that one."""
    variable = _SSH_VARIABLES[launcher][0]
    return [*SSH, *_port(ssh_port), *shlex.split(given.get(variable, ""))]


def _port(ssh_port: int | None) -> list[str]:
    return ["-p", str(ssh_port)] if ssh_port is not None else []


def _refuse_users(hosts: Sequence[Host]) -> None:
    """MPI's launchers take no user in a host's name."""
    for host in hosts:
        if host.address != host.name:
            raise UserError(f"{host.name}: mpirun accepts no user in a host name: set `User` in "
                            "~/.ssh/config, or use --launcher pdsh")  # fmt: skip


def _joined(parts: Sequence[list[str]]) -> list[str]:
    """Programs of one MPI job, a colon between them."""
    return [word for part in parts for word in (*part, ":")][:-1]
