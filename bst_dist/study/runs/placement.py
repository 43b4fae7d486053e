"""Training a study on several hosts: the same `bst sweep run` on each host, or in each task of a Slurm array.

Locks on the runs coordinate these commands, so the runs are not divided in advance. A fast host takes more runs, and
the other hosts take over the runs of a lost host. The number of tasks only changes the total time.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from bst_base.errors import UserError
from bst_base.files import write_text
from bst_dist.cluster.hosts import Host
from bst_dist.cluster.launchers import SSH

NOTICE_S = 120
"""Seconds between Slurm's signal and the end of a task, in which the run writes a checkpoint."""


class PlacementError(UserError):
    """The runs cannot be trained on these hosts or submitted to Slurm."""


def workers_on(host: Host, ranks: int) -> int:
    """Return the number of runs that a host trains in parallel; raises PlacementError if not even one fits."""
    if host.slots < ranks:
        raise PlacementError(f"{host.name} has {host.slots} slots and a run needs {ranks} (ranks of the base recipe)")
    return host.slots // ranks


def on_host(host: Host, ranks: int, directory: Path, words: Sequence[str]) -> list[str]:
    """Return the ssh command that runs `bst` with the arguments `words` on a host, in `directory`.

    ssh allocates a terminal (-tt) only for its SIGHUP: when the connection ends, by a kill here or by the network, the
    remote command gets a SIGHUP, ends its runs and releases their locks.
    """
    remote = [*_bst(words), "--workers", str(workers_on(host, ranks))]
    return [*SSH, "-tt", host.name, f"cd {shlex.quote(str(directory))} && exec {shlex.join(remote)}"]


def run_on_hosts(commands: Mapping[str, list[str]], say: Callable[[str], None]) -> dict[str, int]:
    """Run the commands of all hosts in parallel, print their output with the host's name, return exit statuses."""
    running = {
        name: subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for name, command in commands.items()
    }
    readers = [threading.Thread(target=_tell, args=(name, process, say)) for name, process in running.items()]
    try:
        for thread in readers:
            thread.start()
        return {name: process.wait() for name, process in running.items()}
    finally:
        for process in running.values():
            process.terminate()
        for thread in readers:
            thread.join()


def slurm_script(
    name: str, root: Path, tasks: int, directory: Path, words: Sequence[str], options: Sequence[str]
) -> str:
    """Return the batch script of an array of `tasks`. Each task trains runs until none is left.

    NOTICE_S before its time limit a task gets a signal. Its run then writes a checkpoint, and the task is requeued.
    """
    lines = [
        f"#SBATCH --job-name={name}",
        f"#SBATCH --array=0-{tasks - 1}",
        "#SBATCH --nodes=1",
        f"#SBATCH --chdir={directory}",
        f"#SBATCH --output={root}/slurm/%A_%a.log",
        "#SBATCH --open-mode=append",
        f"#SBATCH --signal=B:TERM@{NOTICE_S}",
        "#SBATCH --requeue",
        *(f"#SBATCH {option}" for option in options),
    ]
    body = f"""
trap 'stopped=yes; [ -z "$study" ] || kill -TERM $study' TERM
{shlex.join(_bst(words))} &
study=$!
[ -z "$stopped" ] || kill -TERM $study  # told to stop before it was started
wait $study
status=$?
if [ -n "$stopped" ]; then
    wait $study  # the first one was cut short by the signal
    exec scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}"
fi
exit $status
"""
    return "\n".join(["#!/bin/bash", *lines]) + "\n" + body


def submit(script: str, root: Path) -> str:
    """Write the script into the study's directory and submit it to Slurm; return the output of sbatch."""
    path = root / "slurm.sh"
    (root / "slurm").mkdir(parents=True, exist_ok=True)
    write_text(path, script)
    try:
        done = subprocess.run(["sbatch", str(path)], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise PlacementError(f"sbatch is not on the PATH; the script is {path}: submit it where Slurm is") from None
    if done.returncode:
        raise PlacementError(f"sbatch {path}: {done.stderr.strip()}")
    return done.stdout.strip()


def _bst(words: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "bst_dist", *words]


def _tell(name: str, process: subprocess.Popen[bytes], say: Callable[[str], None]) -> None:
    for line in process.stdout or ():
        text = line.decode(errors="replace").rstrip()
        if text:
            say(f"{name}: {text}")
