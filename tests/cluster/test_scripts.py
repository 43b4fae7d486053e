"""The scripts of launch/cluster that need no ssh, and checks of those that need a cluster's software."""

from __future__ import annotations

import argparse
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from bst_dist.cluster import local
from bst_dist.faults.status import RESUBMIT
from bst_dist.train.rundir import read_outcome

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "launch/cluster").glob("*.s*"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_valid_bash(script):
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("status", "requeued", "exit_status"),
    [
        (0, 3, 0),
        (75, 3, "again"),
        (75, 60, "again"),
        (70, 3, "again"),
        (70, 50, 70),
        (74, None, "again"),
        (74, 49, "again"),
        (74, 50, 74),
        (2, 3, 2),
        (1, None, 1),
    ],
)
def test_the_slurm_script_requeues_what_a_later_start_may_cure(tmp_path, status, requeued, exit_status):
    counted = {} if requeued is None else {"SLURM_RESTART_COUNT": str(requeued)}
    done = submit(tmp_path, "small.yaml", bst=f"exit {status}", python="echo small", **counted)
    waited = ["sleep 60"] if status == 74 and exit_status == "again" else []
    assert done.stdout.splitlines() == [*waited, *(["scontrol requeue 7"] if exit_status == "again" else [])]
    assert done.returncode == (0 if exit_status == "again" else exit_status), done.stderr


def submit(tmp_path: Path, *words: str, bst: str, python: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the Slurm script with these arguments, in `tmp_path`.

    `bst`, `python`: what these commands do, as lines of shell. `scontrol` and `sleep` print what they were asked.
    """
    programs = tmp_path / "bin"
    programs.mkdir()
    lines = {"bst": bst, "python": python, "sleep": 'echo "sleep $*"', "scontrol": 'echo "scontrol $*"'}
    for name, text in lines.items():
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(0o755)
    own = {"BST_BIN": str(programs), "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "7"}
    return subprocess.run(
        ["bash", ROOT / "launch/cluster/slurm.sbatch", *words],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, **own, **variables},
    )


REAL_PYTHON = f'exec {sys.executable} "$@"'


@pytest.mark.parametrize(("kind", "status"), [("unreadable", 0), ("damaged", 2)])
def test_the_slurm_script_requeues_when_the_recipe_cannot_be_read(tmp_path, kind, status):
    """The recipe is read for the run's name before `bst launch` starts. A file system may be away for minutes."""
    recipe = tmp_path / "recipe.yaml"
    if kind == "unreadable":
        recipe = Path("/proc/1/mem")  # a file whose first byte nobody can read
    else:
        recipe.write_text("name: [")
    done = submit(tmp_path, str(recipe), bst="echo started", python=REAL_PYTHON)
    assert done.returncode == status, done.stderr
    assert done.stdout.splitlines() == ([] if status else ["sleep 60", "scontrol requeue 7"])
    assert "slurm.sbatch: " in done.stderr


def test_the_slurm_script_accepts_a_recipe_with_an_equals_sign_in_its_name(tmp_path):
    recipe = tmp_path / "lr=3e-4.yaml"
    recipe.write_text((ROOT / "launch/recipes/demo.yaml").read_text())
    done = submit(tmp_path, "train.steps=7", recipe.name, "name=other", bst='echo "$@"', python=REAL_PYTHON)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"launch {recipe} train.steps=7 name=other --launcher slurm --run-dir runs/other ")


def test_the_dockerfile_passes_hadolint():
    """The Dockerfile is only linted, because images cannot be built here."""
    done = subprocess.run(
        [Path(sys.executable).with_name("hadolint"), ROOT / "launch/cluster/Dockerfile"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_dockerfile_matches_the_kubernetes_manifest():
    job = list(yaml.safe_load_all((ROOT / "launch/cluster/kubernetes.yaml").read_text()))[1]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    text = (ROOT / "launch/cluster/Dockerfile").read_text()
    assert f"--tag {container['image']} ." in text
    assert f"WORKDIR {container['workingDir']}\n" in text
    for copied in re.findall(r"^COPY (\S+) ", text, re.MULTILINE):
        assert (ROOT / copied).exists(), copied
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    assert packages <= set(re.findall(r"^COPY (\S+) ", text, re.MULTILINE))


def test_the_kubernetes_manifest_is_valid():
    documents = list(yaml.safe_load_all((ROOT / "launch/cluster/kubernetes.yaml").read_text()))
    assert [document["kind"] for document in documents] == ["Service", "Job"]
    for document in documents:
        kubernetes_validate.validate(document, "1.31", strict=True)


def test_the_kubernetes_pod_count_matches_the_launch_command():
    job = list(yaml.safe_load_all((ROOT / "launch/cluster/kubernetes.yaml").read_text()))[1]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    parser = argparse.ArgumentParser()
    local.add_arguments(parser)
    command = [*container["command"][2:], *container["args"]]
    args = parser.parse_args([word.replace("$(JOB_COMPLETION_INDEX)", "3") for word in command])
    share = local.share_of(args, recipe=None)
    assert args.nodes == job["completions"] == job["parallelism"]
    assert args.ranks == container["resources"]["limits"]["nvidia.com/gpu"]
    assert (share.first, share.world) == (24, 32)
    assert args.grace < job["template"]["spec"]["terminationGracePeriodSeconds"]


@pytest.mark.cluster
def test_mpich_trains_on_three_hosts(launch, recipe, tmp_path):
    started = launch(command=["launch/cluster/mpich.sh", str(recipe(6)), "HOSTFILE", str(tmp_path / "run")])
    assert started.status() == 0, started.said
    assert read_outcome(tmp_path / "run")["step"] == 6


@pytest.mark.cluster
def test_torchrun_trains_on_two_hosts_without_ssh(launch, recipe, network, tmp_path):
    small, run_dir = recipe(6), tmp_path / "run"
    common = ["env", f"MASTER_ADDR={network.hosts[0]}", "NODES=2", "RANKS=1", "GLOO_SOCKET_IFNAME=eth0"]
    script = ["launch/cluster/torchrun.sh", str(small), str(run_dir)]
    started = [
        launch(command=[*network.inside(host), *common, f"NODE={number}", *script])
        for number, host in enumerate(network.hosts[:2])
    ]
    for one in started:
        assert one.status() == 0, one.said
    assert read_outcome(run_dir)["step"] == 6


def start_one_rank_on_each_of_two_hosts(launch, network, recipe: Path, run_dir: Path, master: str) -> list[Any]:
    """Start `bst train` by hand on each host, as without a launcher."""
    command = [str(Path(sys.executable).with_name("bst")), "train", str(recipe), "--run-dir", str(run_dir)]
    command += ["--nodes", "2", "--ranks", "1", "--master", f"{master}:29500"]
    return [
        launch(command=[*network.inside(host), *command, "--node", str(number)])
        for number, host in enumerate(network.hosts[:2])
    ]


@pytest.mark.cluster
def test_hosts_that_each_start_their_own_ranks_stop_together(launch, recipe, network, tmp_path):
    run_dir = tmp_path / "run"
    started = start_one_rank_on_each_of_two_hosts(launch, network, recipe(500), run_dir, network.hosts[0])
    started[0].until("step-00000010:")
    os.kill(started[1].process.pid, signal.SIGTERM)
    assert [one.status() for one in started] == [RESUBMIT, RESUBMIT], started[0].said
    assert 10 <= read_outcome(run_dir)["step"] < 500


@pytest.fixture
def ipv6_alone(network):
    """Give two hosts only IPv6 addresses; return these."""
    if not socket.has_dualstack_ipv6():
        pytest.skip("this system has no IPv6")
    hosts = {host: f"fd0b:57::{number}" for number, host in enumerate(network.hosts[:2], 1)}

    def change(host: str, begin: list[str], end: list[str]) -> None:
        for words in (["add", *begin], ["del", *end]):
            command = ["ip", "-n", network.space(host), "address", *words, "dev", "eth0"]
            subprocess.run([*command, *(["nodad"] if ":" in words[1] and words[0] == "add" else [])], check=True)

    for host, address in hosts.items():
        change(host, [f"{address}/64"], [f"{host}/24"])
    yield list(hosts.values())
    for host, address in hosts.items():
        change(host, [f"{host}/24"], [f"{address}/64"])


@pytest.mark.cluster
def test_ipv6_only_hosts_train_together(launch, recipe, network, ipv6_alone, tmp_path):
    run_dir = tmp_path / "run"
    started = start_one_rank_on_each_of_two_hosts(launch, network, recipe(6), run_dir, f"[{ipv6_alone[0]}]")
    for one in started:
        assert one.status() == 0, one.said
    assert read_outcome(run_dir)["step"] == 6


@pytest.fixture
def named(network):
    """Two hosts with different host names, because MPI treats hosts with the same name as one host."""
    hosts = network.hosts[:2]
    for host in hosts:
        network.power_off(host)
        network.power_on(host, name=f"host{host.rpartition('.')[2]}")
    yield hosts
    for host in hosts:
        network.power_off(host)
        network.power_on(host)


@pytest.mark.cluster
def test_ranks_that_mpirun_starts_find_each_other_through_mpi4py(launch, recipe, named, tmp_path):
    names = ("GLOO_SOCKET_IFNAME=eth0", "OMP_NUM_THREADS=1")
    command = [
        str(Path(sys.executable).with_name("mpirun")),
        "--allow-run-as-root",
        "--wdir",
        str(ROOT),
        "-n",
        "2",
        "--host",
        ",".join(named),
        *(word for name in names for word in ("-x", name)),
    ]
    program = [sys.executable, "-m", "bst_dist.train", str(recipe(6)), "--run-dir", str(tmp_path / "run")]
    started = launch(command=[*command, *program])
    assert started.status() == 0, started.said
    assert "2 (dp 2 x sp 1)" in started.said
    assert read_outcome(tmp_path / "run")["step"] == 6
