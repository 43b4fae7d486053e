"""A real Slurm on the hosts of the test network: jobs are submitted with sbatch, as a user would.

slurmd wants cgroup v1 or v2 to itself and refuses what containers often have; so it gets a file system of its own, in
which the few controllers that it looks for are mounted.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bst_dist.train.rundir import read_outcome

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"/usr/sbin/slurmctld": "slurmctld", "/usr/sbin/slurmd": "slurmd", "sbatch": "slurm-client",
            "/usr/sbin/munged": "munge"}  # fmt: skip
CONTROLLERS = ("freezer", "cpuset", "memory", "devices")
CONFIGURATION = """
ClusterName=test
SlurmctldHost={controller}({address})
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket
SlurmctldPort={port}
SlurmdPort={daemon_port}
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool-%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd-%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/linear
MpiDefault=none
ReturnToService=2
KillWait=20
MailProg=/bin/true
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE
"""


class Slurm:
    """A controller on the launching machine, a daemon on each host."""

    def __init__(self, network, directory: Path) -> None:
        self.network, self.directory = network, directory
        self.daemons: list[subprocess.Popen[bytes]] = []
        self.environment = {**os.environ, "SLURM_CONF": str(directory / "slurm.conf"), "DS_ACCELERATOR": "cpu",
                            "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR",
                            "BST_BIN": str(Path(sys.executable).parent)}  # fmt: skip

    def start(self) -> None:
        """Write the configuration and start all daemons; returns when every node is idle."""
        self._configure()
        self._munge()
        self._run("slurmctld", "/usr/sbin/slurmctld", "-D", "-i")
        groups = "mount -t tmpfs none /sys/fs/cgroup && cd /sys/fs/cgroup && " + " && ".join(
            f"mkdir {name} && mount -t cgroup -o {name} none {name}" for name in CONTROLLERS
        )
        for number, host in enumerate(self.network.hosts, 1):
            daemon = f"{groups} && exec /usr/sbin/slurmd -D -N n{number}"
            self._run(f"slurmd-{number}", *self.network.inside(host), "unshare", "-m", "sh", "-c", daemon)
        self._until(lambda: self.ask("sinfo", "-h", "-o", "%t %D").split() == ["idle", "3"], 30)

    def _configure(self) -> None:
        cores = os.cpu_count()
        nodes = [f"NodeName=n{number} NodeAddr={host} CPUs={cores} State=UNKNOWN"
                 for number, host in enumerate(self.network.hosts, 1)]  # fmt: skip
        ports = [_free_port(), _free_port()]
        (self.directory / "slurm.conf").write_text(CONFIGURATION.format(
            controller=socket.gethostname(), address=f"{self.network.subnet}.254", directory=self.directory,
            port=ports[0], daemon_port=ports[1], nodes="\n".join(nodes),
        ))  # fmt: skip
        (self.directory / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
        (self.directory / "state").mkdir()

    def _munge(self) -> None:
        key = self.directory / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        files = [f"--{name}={self.directory}/munge.{name.split('-')[0]}" for name in ("socket", "pid-file", "log-file")]
        # --force: the directory of a test is not as guarded as munged would like.
        self._run("munged", "/usr/sbin/munged", "-F", "--force", f"--key-file={key}", *files,
                  f"--seed-file={self.directory}/munge.seed")  # fmt: skip
        self._until((self.directory / "munge.socket").exists, 10)

    def _run(self, name: str, *command: str) -> None:
        with (self.directory / f"{name}.out").open("wb") as log:
            self.daemons.append(subprocess.Popen(command, env=self.environment, stdout=log, stderr=log,
                                                 start_new_session=True))  # fmt: skip

    def ask(self, *command: str) -> str:
        """What a Slurm command prints."""
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, cwd=ROOT).stdout

    def submit(self, *words: str, log: Path) -> str:
        """Submit launch/cluster/slurm.sbatch for all hosts; returns the job's number."""
        options = ["--nodes=3", "--ntasks-per-node=1", "--gpus-per-node=0", f"--output={log}",
                   f"--export=ALL,RUNS={log.parent}", *words[:-1]]  # fmt: skip
        said = self.ask("sbatch", "--parsable", *options, "launch/cluster/slurm.sbatch", words[-1])
        assert said.strip(), "sbatch refused the job"
        return said.strip()

    def wait(self, job: str, log: Path, timeout_s: float = 240) -> str:
        """Wait for a job's end; returns its state and exit code, as 0:0."""

        def state() -> dict[str, str]:
            return dict(re.findall(r"(JobState|ExitCode)=(\S+)", self.ask("scontrol", "show", "job", job)))

        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self._until(lambda: state().get("JobState") in ended, timeout_s, log)
        return f"{state()['JobState']} {state()['ExitCode']}"

    def _until(self, true: Callable[[], bool], timeout_s: float, log: Path | None = None) -> None:
        deadline = time.monotonic() + timeout_s
        while not true():
            if time.monotonic() > deadline:
                logs = [log] if log is not None and log.exists() else sorted(self.directory.glob("*.*o*"))
                raise AssertionError("\n".join(f"{path}:\n{path.read_text(errors='replace')[-2000:]}" for path in logs))
            time.sleep(0.2)

    def stop(self) -> None:
        """End all daemons and what they have started."""
        self.ask("scancel", "--user=root")
        for host in self.network.hosts:
            self.network.kill([one for one in self.network.processes(host) if "sshd" not in one.name()])
        for daemon in self.daemons:
            daemon.kill()
            daemon.wait()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def slurm(network, tmp_path_factory) -> Iterator[Slurm]:
    network.require(PACKAGES)
    made = Slurm(network, tmp_path_factory.mktemp("slurm"))
    try:
        made.start()
        yield made
    finally:
        made.stop()


def test_a_job_ends_with_status_0_through_the_script(slurm, recipe, tmp_path):
    log = tmp_path / "log"
    job = slurm.submit(str(recipe(6)), log=log)
    assert slurm.wait(job, log) == "COMPLETED 0:0", log.read_text()
    assert read_outcome(tmp_path / "recipe")["step"] == 6
