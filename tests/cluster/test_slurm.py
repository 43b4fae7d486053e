"""A real Slurm on the hosts of the test network: jobs are submitted with sbatch, as a user would.

slurmd needs its own cgroup v1 or v2 hierarchy and refuses what containers often have. So it gets a separate file
system, in which the few controllers that it needs are mounted.
"""

from __future__ import annotations

import os
import re
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from bst_base.host import free_port
from bst_dist.train.rundir import read_outcome, read_recipe

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).resolve().parents[2]
BST = Path(sys.executable).with_name("bst")
PACKAGES = {
    "/usr/sbin/slurmctld": "slurmctld",
    "/usr/sbin/slurmd": "slurmd",
    "sbatch": "slurm-client",
    "/usr/sbin/munged": "munge",
}
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
TaskPlugin=task/affinity
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
DefMemPerNode=64
GresTypes=gpu
MpiDefault=none
ReturnToService=2
KillWait=5
MailProg=/bin/true
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE
"""


class Slurm:
    """Slurm with a controller on the launching machine and a daemon on each host."""

    def __init__(self, network, directory: Path) -> None:
        self.network, self.directory = network, directory
        self.daemons: list[subprocess.Popen[bytes]] = []
        own = {
            "SLURM_CONF": str(directory / "slurm.conf"),
            "OMP_NUM_THREADS": "1",
            "TORCH_CPP_LOG_LEVEL": "ERROR",
            "BST_BIN": str(Path(sys.executable).parent),
        }
        self.environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"} | own

    def start(self) -> None:
        """Write the configuration, start all daemons, and wait until every node is idle."""
        self._configure()
        self._munge()
        self._run("slurmctld", "/usr/sbin/slurmctld", "-D", "-i")
        groups = "mount -t tmpfs none /sys/fs/cgroup && cd /sys/fs/cgroup && " + " && ".join(
            f"mkdir {name} && mount -t cgroup -o {name} none {name}" for name in CONTROLLERS
        )
        for number, host in enumerate(self.network.hosts, 1):
            daemon = f"{groups} && exec /usr/sbin/slurmd -D -N n{number}"
            self._run(f"slurmd-{number}", *self.network.inside(host), "unshare", "-m", "sh", "-c", daemon)
        self.until(lambda: self.ask("sinfo", "-h", "-o", "%t %D").split() == ["idle", "3"], 30)

    def _configure(self) -> None:
        cores = os.cpu_count()
        nodes = [
            f"NodeName=n{number} NodeAddr={host} CPUs={cores} RealMemory=1000 Gres=gpu:2 State=UNKNOWN"
            for number, host in enumerate(self.network.hosts, 1)
        ]
        ports = [free_port(), free_port()]
        (self.directory / "slurm.conf").write_text(
            CONFIGURATION.format(
                controller=socket.gethostname(),
                address=f"{self.network.subnet}.254",
                directory=self.directory,
                port=ports[0],
                daemon_port=ports[1],
                nodes="\n".join(nodes),
            )
        )
        (self.directory / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
        # Fake devices (null and zero): Slurm assigns them and sets CUDA_VISIBLE_DEVICES all the same.
        for number, minor in enumerate((3, 5)):
            os.mknod(self.directory / f"gpu{number}", 0o600 | stat.S_IFCHR, os.makedev(1, minor))
        (self.directory / "gres.conf").write_text(f"Name=gpu File={self.directory}/gpu[0-1]\n")
        (self.directory / "state").mkdir()

    def _munge(self) -> None:
        key = self.directory / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        files = [f"--{name}={self.directory}/munge.{name.split('-')[0]}" for name in ("socket", "pid-file", "log-file")]
        # --force: the permissions of a test's directory are not as strict as munged requires.
        self._run(
            "munged",
            "/usr/sbin/munged",
            "-F",
            "--force",
            f"--key-file={key}",
            *files,
            f"--seed-file={self.directory}/munge.seed",
        )
        self.until((self.directory / "munge.socket").exists, 10)

    def _run(self, name: str, *command: str) -> None:
        with (self.directory / f"{name}.out").open("wb") as log:
            self.daemons.append(
                subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, start_new_session=True)
            )

    def ask(self, *command: str) -> str:
        """Run a Slurm command; return its output, errors included."""
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.run(command, env=self.environment, cwd=ROOT, **output).stdout.strip()

    def submit(
        self, *script: str, log: Path, options: Sequence[str] = ("--ntasks-per-node=1", "--gpus-per-node=0")
    ) -> str:
        """Submit a script with its arguments for all hosts, one task per host; return the job id."""
        options = ["--nodes=3", *options, "--no-kill", f"--output={log}"]
        said = self.ask("sbatch", "--parsable", *options, f"--export=ALL,RUNS={log.parent}", *script)
        assert said.isdigit(), said
        return said

    def wait(self, job: str, log: Path, timeout_s: float = 240) -> str:
        """Wait for the end of a job; return its exit code, such as 0:0.

        With a lost node the job stays in state COMPLETING for long, so this state also counts as ended.
        """

        def state() -> dict[str, str]:
            return dict(re.findall(r"(JobState|ExitCode)=(\S+)", self.ask("scontrol", "show", "job", job)))

        ended = ("COMPLETING", "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self.until(lambda: state().get("JobState") in ended, timeout_s, log)
        return state()["ExitCode"]

    def until(self, true: Callable[[], bool], timeout_s: float, log: Path | None = None) -> None:
        """Wait until `true()` holds. Raise AssertionError with the logs after `timeout_s` seconds."""
        deadline = time.monotonic() + timeout_s
        while not true():
            if time.monotonic() > deadline:
                logs = [log] if log is not None and log.exists() else sorted(self.directory.glob("*.*o*"))
                raise AssertionError("\n".join(f"{path}:\n{path.read_text(errors='replace')[-2000:]}" for path in logs))
            time.sleep(0.2)

    def stop(self) -> None:
        """End all daemons, jobs and their processes."""
        self.ask("scancel", "--user=root")
        for host in self.network.hosts:
            self.network.kill([one for one in self.network.processes(host) if "sshd" not in one.name()])
        for daemon in self.daemons:
            daemon.kill()
            daemon.wait()


@pytest.fixture(scope="module")
def slurm(network, tmp_path_factory) -> Iterator[Slurm]:
    network.require(PACKAGES)
    made = Slurm(network, tmp_path_factory.mktemp("slurm"))
    try:
        made.start()
        yield made
    finally:
        made.stop()


SCRIPT = "launch/cluster/slurm.sbatch"


def test_a_job_that_is_told_to_stop_is_requeued_and_finishes(slurm, recipe, tmp_path):
    log = tmp_path / "log"
    job = slurm.submit(SCRIPT, str(recipe(60)), "schedule.warmup_steps=3", log=log)
    slurm.until(lambda: log.exists() and "step-00000020:" in log.read_text(), 120, log)
    slurm.ask("scancel", "--signal=USR1", job)  # as --signal=USR1@120 does before the time limit
    slurm.until(lambda: "JobState=PENDING" in slurm.ask("scontrol", "show", "job", job), 60, log)
    # Slurm waits two minutes before a requeued job. It would be killed within the second in which the nodes revoke its
    # credential, so start it a few seconds later.
    slurm.ask("scontrol", "update", f"JobId={job}", "StartTime=now+5")
    # Before that, the first start may still be in state COMPLETING, with its own exit code.
    slurm.until(lambda: "resumed from step" in log.read_text(), 240, log)
    assert slurm.wait(job, log) == "0:0", log.read_text()
    assert {"Restarts=1", "MinMemoryNode=0"} <= set(slurm.ask("scontrol", "show", "job", job).split())
    (stopped,) = re.findall(r"stopped after step (\d+)", log.read_text())
    assert f"resumed from step {stopped} " in log.read_text()
    assert read_outcome(tmp_path / "small")["step"] == 60  # named after the recipe
    assert read_recipe(tmp_path / "small").schedule.warmup_steps == 3


LOOK = """
import os, sys
from pathlib import Path
from bst_dist.cluster.controller import Controller, LaunchOptions
from bst_dist.cluster.elastic import shares
from bst_dist.cluster.hosts import slurm_hosts

hosts = slurm_hosts()
program = "import os; print('rank', os.environ['RANK'], 'local', os.environ['LOCAL_RANK'], 'devices', "
program += "os.environ.get('CUDA_VISIBLE_DEVICES'), 'cores', len(os.sched_getaffinity(0)))"
with Controller(hosts, LaunchOptions("slurm", Path.cwd())) as controller:
    missing = controller.call()
    assert not missing, missing
    placed = shares(hosts, sum(host.slots for host in hosts), controller.address("n1"), controller.free_port("n1"))
    assert controller.run([sys.executable, "-c", program], {}, placed).status == 0
"""


@pytest.mark.parametrize(
    "options",
    [
        ("--ntasks-per-node=2", "--gpus-per-task=1", "--cpus-per-task=1"),
        ("--ntasks-per-node=1", "--gpus-per-node=2", "--exclusive"),  # one task, which starts the ranks
        ("--ntasks-per-node=1", "--gpus-per-task=2", "--exclusive"),
    ],
    ids=["a-device-a-task", "one-task", "one-task-all-devices"],
)
def test_per_task_job_options_do_not_limit_the_ranks_of_a_node(slurm, tmp_path, options):
    """Two ranks per node; both see both devices and every core, and differ in LOCAL_RANK."""
    log, script, look = tmp_path / "log", tmp_path / "job.sh", tmp_path / "look.py"
    look.write_text(LOOK)
    # Newer versions of sbatch set this for --cpus-per-task, so that srun uses it again.
    script.write_text(f"#!/bin/sh\ncd {ROOT}\nexport SRUN_CPUS_PER_TASK=1\nexec {sys.executable} {look}\n")
    job = slurm.submit(str(script), log=log, options=options)
    assert slurm.wait(job, log) == "0:0", log.read_text()
    found = sorted(line for line in log.read_text().splitlines() if line.startswith("rank "))
    assert found == [f"rank {rank} local {rank % 2} devices 0,1 cores {os.cpu_count()}" for rank in range(6)]


DIRECT = """#!/bin/sh
cd {root}
start() {{
    srun --overlap -N 2 -n 2 --cpu-bind=none sh -c 'RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=0 \\
        MASTER_ADDR={address} MASTER_PORT='$1' GLOO_SOCKET_IFNAME=eth0 \\
        exec {python} -m bst_dist.train {recipe} --run-dir {run} --resume'
}}
start 29811 &
until grep -q "}}" {run}/lease/*.json; do sleep 0.5; done
start 29812
echo "second start: $?"
scancel --signal=TERM $SLURM_JOB_ID.0
wait $!
echo "first start: $?"
"""


def test_a_second_srun_on_one_run_directory_is_refused(slurm, recipe, network, tmp_path):
    """Both without `bst launch`: srun starts the ranks, and sets their rank in environment variables."""
    log, script, run = tmp_path / "log", tmp_path / "job.sh", tmp_path / "run"
    script.write_text(
        DIRECT.format(root=ROOT, address=network.hosts[0], python=sys.executable, recipe=recipe(100_000), run=run)
    )
    job = slurm.submit(str(script), log=log)
    slurm.wait(job, log, timeout_s=600)
    said = log.read_text()
    assert "second start: 2" in said, said
    assert re.search(rf"bst train: {run}: process \d+ on \S+ \(Slurm job {job}, since .* trains there", said), said
    assert "first start: 75" in said, said


# Must be the last test of this file: the node stays lost for the daemons that all tests share.
def test_a_node_that_loses_its_power_is_left_out(slurm, recipe, network, tmp_path):
    log, script = tmp_path / "log", tmp_path / "job.sh"
    words = f"--launcher slurm --max-restarts 1 --lost-after 5 --run-dir {tmp_path}/run"
    script.write_text(f"#!/bin/sh\ncd {ROOT}\nexec {BST} launch {recipe(60)} {words}\n")
    job = slurm.submit(str(script), log=log)
    slurm.until(lambda: log.exists() and "step-00000020:" in log.read_text(), 120, log)
    network.power_off(network.hosts[2])
    try:
        assert slurm.wait(job, log) == "0:0", log.read_text()
    finally:
        network.power_on(network.hosts[2])
    assert "lost n3: silent for" in log.read_text()
    assert "2 ranks (dp 2 x sp 1) on n1, n2" in log.read_text()
    assert read_outcome(tmp_path / "run")["step"] == 60
