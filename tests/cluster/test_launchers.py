"""The command line and environment of each launcher."""

from __future__ import annotations

from pathlib import Path

import pytest

from bst_base.errors import UserError
from bst_dist.cluster import launchers
from bst_dist.cluster.hosts import Host
from bst_dist.cluster.launchers import LAUNCHERS, environment, keys, ssh

HOSTS = [Host("node-01", 8), Host("me@node-02.example.org", 8)]
PLAIN = [Host("node-01", 8), Host("node-02", 8)]


def line(launcher: str, hosts=PLAIN) -> list[str]:
    return LAUNCHERS[launcher](hosts, Path("/some where/100%"), ["python", "-m", "agent"])


def test_agents_are_identified_by_position_and_under_slurm_by_node():
    assert keys("pdsh", HOSTS) == {"0": "node-01", "1": "me@node-02.example.org"}
    assert keys("slurm", HOSTS) == {"node-01": "node-01", "node-02": "me@node-02.example.org"}
    assert "--nodelist=node-01,node-02" in line("slurm", HOSTS)
    assert line("pdsh", HOSTS)[-1] == "cd '/some where/100%%' && exec python -m agent --key %n"


def test_agents_are_not_bound_to_cores():
    assert line("openmpi")[line("openmpi").index("--bind-to") + 1] == "none"
    assert "--cpu-bind=none" in line("slurm")


def test_batch_job_options_are_not_passed_to_the_agents_step():
    job = {"SLURM_JOB_ID": "7", "SLURM_CONF": "/etc/slurm.conf", "PATH": "/bin"}
    options = {
        "SRUN_CPUS_PER_TASK": "1",
        "SLURM_GPUS_PER_TASK": "1",
        "SLURM_NTASKS_PER_NODE": "8",
        "SLURM_CPU_BIND": "cores",
        "SLURM_LABELIO": "1",
        "SLURM_PROCID": "0",
    }
    assert environment("slurm", None, job | options) == job


@pytest.mark.parametrize(
    ("tasks", "asked_for", "option"),
    [
        ("8(x2)", "1", ["--gpus-per-node=8"]),
        ("8(x2)", "h100:2", ["--gpus-per-node=16"]),
        ("1(x2)", "8", ["--gpus-per-node=8"]),  # one task, whose accelerators are the slots
        ("8(x2)", "", []),
        ("8,3", "", []),
    ],
)
def test_the_agents_get_the_accelerators_of_all_ranks_of_a_node(monkeypatch, tasks, asked_for, option):
    monkeypatch.setenv("SLURM_TASKS_PER_NODE", tasks)
    monkeypatch.setenv("SLURM_GPUS_PER_TASK", asked_for)
    assert [word for word in line("slurm") if word.startswith("--gpus")] == option


def test_accelerators_per_task_of_uneven_tasks_are_refused(monkeypatch):
    """One step cannot get them: of Slurm 22.05, tried on the hosts of test_slurm.py."""
    monkeypatch.setenv("SLURM_TASKS_PER_NODE", "2,1")
    monkeypatch.setenv("SLURM_GPUS_PER_TASK", "1")
    with pytest.raises(UserError, match=r"different numbers of tasks \(2,1\): .* request --gpus-per-node"):
        line("slurm", [Host("node-01", 2), Host("node-02", 1)])


@pytest.mark.parametrize(
    ("launcher", "variable"),
    [("pdsh", "PDSH_SSH_ARGS_APPEND"), ("openmpi", "OMPI_MCA_plm_rsh_args"), ("mpich", "HYDRA_LAUNCHER_EXTRA_ARGS")],
)
def test_preflight_uses_the_same_ssh_options_as_the_launcher(launcher, variable):
    given = {variable: "-F /my/config", "HOME": "/root"}
    own = ssh(launcher, 2222, given)
    assert own[0] == "ssh"
    assert own[-4:] == ["-p", "2222", "-F", "/my/config"]
    assert environment(launcher, 2222, given)[variable].split() == own[1:]
    assert environment(launcher, None, given)["HOME"] == "/root"
    assert "-p" not in ssh(launcher, None, given)


@pytest.mark.parametrize("launcher", ["pdsh", "openmpi", "mpich"])
def test_devices_of_this_machine_are_not_chosen_for_the_hosts(launcher):
    """MPICH passes its whole environment on, and Open MPI passes it to the agent on this machine."""
    assert "CUDA_VISIBLE_DEVICES" not in environment(launcher, None, {"CUDA_VISIBLE_DEVICES": "3"})
    assert environment("local", None, {"CUDA_VISIBLE_DEVICES": "3"}) == {"CUDA_VISIBLE_DEVICES": "3"}


def test_mpich_uses_the_local_address_that_reaches_the_first_host():
    """If no route to that host is known, it uses this machine's name."""
    words = line("mpich", [Host("127.0.0.1", 1), Host("host.invalid", 1)])
    assert words[words.index("-localhost") + 1] == "127.0.0.1"
    assert "-localhost" not in line("mpich", [Host("host.invalid", 1), Host("127.0.0.1", 1)])


@pytest.mark.parametrize("launcher", ["openmpi", "mpich"])
def test_mpi_launchers_refuse_hosts_with_a_user_name_or_an_ipv6_address(launcher):
    with pytest.raises(UserError, match="me@node-02"):
        line(launcher, HOSTS)
    with pytest.raises(UserError, match=f"fd00::1: --launcher {launcher} accepts no IPv6 address"):
        line(launcher, [Host("node-01", 8), Host("fd00::1", 8)])
    assert "-w fd00::1 " in " ".join(line("pdsh", [Host("fd00::1", 8)]))


def test_a_launcher_that_is_not_installed_is_a_user_error(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="pdsh is not on the PATH"):
        launchers.require("pdsh")
    (tmp_path / "pdsh").touch(mode=0o755)
    with pytest.raises(UserError, match="ssh is not on the PATH; Debian has it in openssh-client"):
        launchers.require("pdsh")
