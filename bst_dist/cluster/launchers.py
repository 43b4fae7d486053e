"""The command lines that start one agent on each host, through whatever starts processes there."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from bst_base.errors import UserError
from bst_dist.cluster.hosts import Host
from bst_dist.cluster.processes import route_to

SSH = ("ssh", *("-o", "BatchMode=yes"), *("-o", "ConnectTimeout=8"), *("-o", "ServerAliveInterval=15"))
PDSH_ENVIRONMENT = {"PDSH_SSH_ARGS_APPEND": " ".join([*SSH[1:], os.environ.get("PDSH_SSH_ARGS_APPEND", "")])}


def pdsh(hosts: Sequence[Host], directory: Path, agent: Sequence[str]) -> list[str]:
    """Over ssh, all hosts at once."""
    names = ",".join(host.name for host in hosts)
    remote = f"cd {shlex.quote(str(directory))} && exec {shlex.join(agent)} --host %h"
    return ["pdsh", "-R", "ssh", "-S", "-N", "-f", str(len(hosts)), "-w", names, remote]


def openmpi(hosts: Sequence[Host], directory: Path, agent: Sequence[str]) -> list[str]:
    """Open MPI's daemons, over ssh or a scheduler that they know; the agents are no MPI programs."""
    command = ["mpirun", *(["--allow-run-as-root"] if os.geteuid() == 0 else [])]
    parts = [["--host", host.name, "-n", "1", "--wdir", str(directory), *agent, "--host", host.name] for host in hosts]
    return command + _joined(parts)


def mpich(hosts: Sequence[Host], directory: Path, agent: Sequence[str]) -> list[str]:
    """MPICH's process manager, Hydra, over ssh."""
    names = ",".join(host.name for host in hosts)
    parts = [["-n", "1", *agent, "--host", host.name] for host in hosts]  # one after the other, as the names are
    # Hydra's daemons call back by this machine's name, which other hosts need not know.
    here = ["-localhost", address] if (address := route_to(hosts[0].name)) else []
    common = ["-launcher", "ssh", *here, "-hosts", names, "-ppn", "1", "-wdir", str(directory)]
    return ["mpiexec.hydra", *common, *_joined(parts)]


def slurm(hosts: Sequence[Host], directory: Path, agent: Sequence[str]) -> list[str]:
    """A step of the allocation; its tasks know their node's name."""
    names = ",".join(host.name for host in hosts)
    nodes = [f"--nodes={len(hosts)}", f"--ntasks={len(hosts)}", "--ntasks-per-node=1", f"--nodelist={names}"]
    return ["srun", *nodes, "--overlap", "--no-kill", "--kill-on-bad-exit=0", f"--chdir={directory}", *agent]


LAUNCHERS: dict[str, Callable[[Sequence[Host], Path, Sequence[str]], list[str]]] = {
    "pdsh": pdsh,
    "openmpi": openmpi,
    "mpich": mpich,
    "slurm": slurm,
}
OVER_SSH = ("pdsh", "openmpi", "mpich")
_PACKAGE = {"pdsh": "pdsh", "openmpi": "openmpi-bin", "mpich": "mpich", "slurm": "slurm-client"}


def command(launcher: str, hosts: Sequence[Host], directory: Path, agent: Sequence[str]) -> list[str]:
    """The whole command; raises UserError when the launcher is not installed."""
    line = LAUNCHERS[launcher](hosts, directory, agent)
    program = shutil.which(line[0])
    if program is None:
        raise UserError(f"--launcher {launcher}: {line[0]} is not on the PATH; Debian has it in {_PACKAGE[launcher]}")
    # Open MPI looks for its daemon on the other hosts beside an mpirun that is named by its whole path.
    return [program, *line[1:]]


def _joined(parts: Sequence[list[str]]) -> list[str]:
    """Programs of one MPI job, a colon between them."""
    return [word for part in parts for word in (*part, ":")][:-1]
