"""Lists of hosts from a hostfile and from Slurm."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bst_dist.cluster.hosts import Host, HostError, read_hostfile, slurm_hosts


def test_a_hostfile_keeps_its_order_and_skips_comments(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("# the rack at the window\nnode-02 slots=8\n\n  node-01   slots=4  # half of it\n")
    assert read_hostfile(path) == [Host("node-02", 8), Host("node-01", 4)]


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("node-01", Host("node-01", 1)),
        ("node-01\nnode-01\nnode-01", Host("node-01", 3)),  # as PBS writes it
        ("node-01 max-slots=4", Host("node-01", 4)),
        ("node-01 slots=2 max_slots=4", Host("node-01", 2)),
        ("me@node-01.example.org slots=2", Host("me@node-01.example.org", 2)),
        ("node-01 slots=2 devices=4,5", Host("node-01", 2, "4,5")),
        ("node-01 devices=4,5", Host("node-01", 2, "4,5")),
    ],
)
def test_other_formats_of_a_host_are_accepted(tmp_path, text, host):
    (tmp_path / "hosts").write_text(text)
    assert read_hostfile(tmp_path / "hosts") == [host]


@pytest.mark.parametrize(
    ("name", "address", "node"),
    [
        ("me@node-01.example.org", "node-01.example.org", "node-01"),
        ("10.0.0.1", "10.0.0.1", "10.0.0.1"),
        ("fd00::1", "fd00::1", "fd00::1"),
        ("n1", "n1", "n1"),
    ],
)
def test_a_host_name_gives_its_address_and_slurm_node(name, address, node):
    assert (Host(name, 1).address, Host(name, 1).node) == (address, node)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("node-01 slots\n", "hosts:1: 'node-01 slots' is not a host"),
        ("a slots=1\na\n", "a is listed twice"),
        ("a slots=3 devices=0,1\n", "3 slots, but 2 devices"),
        ("a slots=1\nb slots=0\n", "hosts:2"),
        ("a slots=two\n", "hosts:1"),
        ("a slots=1\na slots=1\n", "a is listed twice"),
        ("# nothing\n", "no host in it"),
    ],
)
def test_a_bad_line_of_a_hostfile_is_named(tmp_path, text, said):
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(HostError, match=said):
        read_hostfile(tmp_path / "hosts")


def test_a_missing_hostfile_is_reported(tmp_path):
    with pytest.raises(HostError, match="cannot be read"):
        read_hostfile(tmp_path / "none")


@pytest.fixture
def scontrol(tmp_path, monkeypatch) -> Callable[[str], None]:
    """``scontrol(script)`` puts a program of this name on the PATH."""

    def write(script: str) -> None:
        (tmp_path / "scontrol").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "scontrol").chmod(0o755)

    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return write


ALLOCATION = {"SLURM_JOB_NODELIST": "n[1-3]"}


@pytest.mark.parametrize(("tasks", "slots"), [("8(x3)", [8, 8, 8]), ("2,1(x2)", [2, 1, 1]), ("4(x2),1", [4, 4, 1])])
def test_slurm_task_counts_give_the_slots_per_node(scontrol, tasks, slots):
    scontrol("echo n1; echo n2; echo n3")
    found = slurm_hosts({**ALLOCATION, "SLURM_TASKS_PER_NODE": tasks})
    assert [(host.name, host.slots) for host in found] == list(zip(("n1", "n2", "n3"), slots, strict=True))
    with pytest.raises(HostError, match="is for 1 nodes, but the allocation has 3"):
        slurm_hosts({**ALLOCATION, "SLURM_TASKS_PER_NODE": "8"})
    with pytest.raises(HostError, match="does not say how many tasks"):
        slurm_hosts({**ALLOCATION, "SLURM_TASKS_PER_NODE": "many"})


@pytest.mark.parametrize(
    ("asked_for", "slots"),
    [
        ({}, 1),
        ({"SLURM_GPUS_PER_NODE": "8"}, 8),
        ({"SLURM_GPUS_PER_NODE": "h100:2"}, 2),
        ({"SLURM_GPUS_PER_NODE": "a100-sxm4-80gb:8"}, 8),
        ({"SLURM_GPUS_PER_NODE": "1g.10gb:7"}, 7),
        ({"SLURM_GPUS_PER_NODE": "gpu:h100:4"}, 4),
        ({"SLURM_GPUS_PER_NODE": "h100:4,a100:2", "SLURM_GPUS_ON_NODE": "6"}, 6),
        ({"SLURM_GPUS_PER_NODE": "h100:4,a100:2"}, 1),
        ({"SLURM_GPUS_ON_NODE": "2"}, 2),
        ({"SLURM_GPUS_PER_NODE": "0"}, 1),
        ({"SLURM_GPUS_PER_TASK": "8"}, 8),
    ],
)
def test_one_slurm_task_per_node_gets_a_rank_per_accelerator(scontrol, asked_for, slots):
    """Not if other nodes have several tasks: there a task is a rank."""
    scontrol("echo n1; echo n2; echo n3")
    found = slurm_hosts({**ALLOCATION, "SLURM_TASKS_PER_NODE": "1(x3)", **asked_for})
    assert [host.slots for host in found] == [slots] * 3
    found = slurm_hosts({**ALLOCATION, "SLURM_TASKS_PER_NODE": "2(x2),1", **asked_for})
    assert [host.slots for host in found] == [2, 2, 1]


def test_slurm_node_names_are_kept_as_they_are(scontrol):
    """A cluster may give its nodes names with a domain; an agent is identified by such a name."""
    scontrol("echo n1.example.org; echo n2.example.org; echo n3.example.org")
    found = slurm_hosts({**ALLOCATION, "SLURM_TASKS_PER_NODE": "1(x3)"})
    assert [host.node for host in found] == [f"n{number}.example.org" for number in (1, 2, 3)]


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo 'slurm_load: no controller' >&2; exit 1", "scontrol .*: slurm_load: no controller"),
        (None, "scontrol is not on the PATH"),
    ],
)
def test_an_allocation_whose_nodes_cannot_be_listed_is_reported(scontrol, tmp_path, monkeypatch, script, said):
    """For example in a container without Slurm's programs."""
    monkeypatch.setenv("PATH", str(tmp_path))
    if script:
        scontrol(script)
    with pytest.raises(HostError, match=f"{said}.*--hostfile"):
        slurm_hosts({**ALLOCATION, "SLURM_TASKS_PER_NODE": "1(x3)"})


def test_slurm_hosts_outside_an_allocation_are_refused():
    with pytest.raises(HostError, match="sbatch"):
        slurm_hosts({})
