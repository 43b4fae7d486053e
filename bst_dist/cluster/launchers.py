"""The command lines that start one agent on each host, for each launcher.

Each agent gets a key: the position of its host in the list. Under Slurm, which orders hosts differently, it is Slurm's
name of the node.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from bst_base.errors import UserError
from bst_dist.cluster.environment import OF_ONE_HOST
from bst_dist.cluster.hosts import Host, HostError, slurm_tasks
from bst_dist.cluster.processes import family_of
from bst_dist.parallel.interface import route_to

SSH = ("ssh", *("-o", "BatchMode=yes"), *("-o", "ConnectTimeout=8"), *("-o", "ServerAliveInterval=15"))
# The variables from which each launcher reads options for ssh; the name changed between versions of Open MPI.
_SSH_VARIABLES = {
    "pdsh": ("PDSH_SSH_ARGS_APPEND",),
    "openmpi": ("OMPI_MCA_plm_rsh_args", "PRTE_MCA_plm_ssh_args"),
    "mpich": ("HYDRA_LAUNCHER_EXTRA_ARGS",),
}
OVER_SSH = tuple(_SSH_VARIABLES)
# The variables of the job that srun needs. All other SLURM_ variables repeat options of the batch job (--gpus-per-task,
# --cpus-per-task, ...): with them, the single agent of a node would get the resources of one rank.
_SLURM_JOB = ("SLURM_CONF", "SLURM_JOB_ID", "SLURM_JOBID", "SLURM_CLUSTERS", "SLURM_CLUSTER_NAME")


def pdsh(hosts: Sequence[Host], directory: Path, agent: Sequence[str]) -> list[str]:
    """Return pdsh's command line: over ssh to all hosts in parallel; it puts the host before each line of output."""
    names = ",".join(host.name for host in hosts)
    line = f"cd {shlex.quote(str(directory))} && exec {shlex.join(agent)} --key "
    return ["pdsh", "-R", "ssh", "-S", "-f", str(len(hosts)), "-w", names, line.replace("%", "%%") + "%n"]


def openmpi(hosts: Sequence[Host], directory: Path, agent: Sequence[str]) -> list[str]:
    """Return Open MPI's command line: over ssh or a supported scheduler; the agents are not MPI programs.

    Without ``--bind-to none`` Open MPI would bind each agent, and with it all its ranks, to a single core.
    """
    _refuse_for_mpi("openmpi", hosts)
    command = ["mpirun", *(["--allow-run-as-root"] if os.geteuid() == 0 else []), "--bind-to", "none"]
    start = ["-n", "1", "--wdir", str(directory), *agent, "--key"]
    return command + _joined([["--host", host.name, *start, str(key)] for key, host in enumerate(hosts)])


def mpich(hosts: Sequence[Host], directory: Path, agent: Sequence[str]) -> list[str]:
    """Return the command line of MPICH's process manager, Hydra, over ssh."""
    _refuse_for_mpi("mpich", hosts)
    names = ",".join(host.name for host in hosts)
    parts = [["-n", "1", *agent, "--key", str(key)] for key in range(len(hosts))]  # one per host, in order
    # Hydra's daemons connect to this machine by its name, which other hosts may not be able to resolve.
    here = ["-localhost", address] if (address := route_to(hosts[0].address)) else []
    common = ["-launcher", "ssh", *here, "-hosts", names, "-ppn", "1", "-wdir", str(directory)]
    return ["mpiexec.hydra", *common, *_joined(parts)]


def slurm(hosts: Sequence[Host], directory: Path, agent: Sequence[str]) -> list[str]:
    """Return srun's command line: a step with all cores and accelerators of the job on each node, without binding."""
    names = ",".join(host.node for host in hosts)
    nodes = [f"--nodes={len(hosts)}", f"--ntasks={len(hosts)}", "--ntasks-per-node=1", f"--nodelist={names}"]
    whole = ["--overlap", "--cpu-bind=none", "--mpi=none", *_all_accelerators(os.environ)]
    return ["srun", *nodes, *whole, "--no-kill", "--kill-on-bad-exit=0", f"--chdir={directory}", *agent]


def _all_accelerators(environment: Mapping[str, str]) -> list[str]:
    """Return srun's option for the accelerators of all tasks of a node, when the job requested them per task.

    The step has one task per node and would only get the accelerators of one task. Accelerators requested per node or
    per job are all available to the step without an option. Raises HostError if nodes have different numbers of tasks:
    Slurm 22.05 gives a step the same number on every node, and spreads a sum (--gpus) as it likes.
    """
    of_task = environment.get("SLURM_GPUS_PER_TASK", "").rpartition(":")[2]
    if not of_task.isdigit():
        return []
    tasks = set(slurm_tasks(environment))
    if len(tasks) > 1:
        counts = environment["SLURM_TASKS_PER_NODE"]
        raise HostError(
            f"the job's accelerators are requested per task, and its nodes have different numbers of tasks "
            f"({counts}): the agents' step cannot get them all; request --gpus-per-node, or add "
            "--ntasks-per-node"
        )
    return [f"--gpus-per-node={int(of_task) * tasks.pop()}"]


def local(hosts: Sequence[Host], directory: Path, agent: Sequence[str]) -> list[str]:
    """Return the agent's command line on this machine, for restarts without another launcher."""
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
"""Launcher -> the programs that it needs on this machine -> their Debian package."""


def keys(launcher: str, hosts: Sequence[Host]) -> dict[str, str]:
    """Return key of the agent -> name of the host."""
    return {host.node if launcher == "slurm" else str(place): host.name for place, host in enumerate(hosts)}


def require(launcher: str) -> None:
    """Raise UserError when the launcher, or the ssh that it uses, is not installed here."""
    for program, package in _PROGRAMS.get(launcher, {}).items():
        if shutil.which(program) is None:
            raise UserError(f"--launcher {launcher}: {program} is not on the PATH; Debian has it in {package}")


def command(launcher: str, hosts: Sequence[Host], directory: Path, agent: Sequence[str]) -> list[str]:
    """Return the launcher's whole command line; raises UserError when the launcher is not installed."""
    require(launcher)
    line = LAUNCHERS[launcher](hosts, directory, agent)
    # Absolute path: Open MPI then looks for its daemon in the same directory on the other hosts.
    return [shutil.which(line[0]) or line[0], *line[1:]]


def death_signal(launcher: str) -> int:
    """Return the signal that the launcher gets when the launching process is killed.

    A launcher of other hosts is killed: their agents notice that the connection has ended. A local agent is not: its
    ranks would be killed with it, without a checkpoint. At SIGTERM it lets them write one.
    """
    return signal.SIGTERM if launcher == "local" else signal.SIGKILL


def environment(launcher: str, ssh_port: int | None, given: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the environment of the launcher; MPI's launchers pass it to agents, so it names no device of this host."""
    if launcher == "slurm":
        return {
            name: value
            for name, value in given.items()
            if not name.startswith(("SLURM_", "SRUN_")) or name in _SLURM_JOB
        }
    if launcher not in OVER_SSH:
        return dict(given)
    options = shlex.join([*SSH[1:], *_port(ssh_port)])
    kept = {name: value for name, value in given.items() if name not in OF_ONE_HOST}
    return kept | {name: f"{options} {given.get(name, '')}".strip() for name in _SSH_VARIABLES[launcher]}


def ssh(launcher: str, ssh_port: int | None, given: Mapping[str, str] = os.environ) -> list[str]:
    """Return an ssh command with the same options as the launcher's ssh, including those set by the user."""
    variable = _SSH_VARIABLES[launcher][0]
    return [*SSH, *_port(ssh_port), *shlex.split(given.get(variable, ""))]


def _port(ssh_port: int | None) -> list[str]:
    return ["-p", str(ssh_port)] if ssh_port is not None else []


def _refuse_for_mpi(launcher: str, hosts: Sequence[Host]) -> None:
    """Raise UserError for a host with a user or an IPv6 address, which MPI's launchers do not support."""
    for host in hosts:
        if family_of(host.address) == socket.AF_INET6:
            raise UserError(
                f"{host.name}: --launcher {launcher} accepts no IPv6 address: write the host's name, or "
                "use --launcher pdsh"
            )
        if host.address != host.name:
            raise UserError(
                f"{host.name}: mpirun accepts no user in a host name: set `User` in "
                "~/.ssh/config, or use --launcher pdsh"
            )


def _joined(parts: Sequence[list[str]]) -> list[str]:
    """Join the programs of one MPI job with colons."""
    return [word for part in parts for word in (*part, ":")][:-1]
