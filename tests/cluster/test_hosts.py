"""Lists of hosts from a hostfile and from Slurm."""

from __future__ import annotations

import pytest

from bst_dist.cluster import hosts
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


@pytest.mark.parametrize(("tasks", "slots"), [("8(x3)", [8, 8, 8]), ("2,1(x2)", [2, 1, 1]), ("4(x2),1", [4, 4, 1])])
def test_slurm_task_counts_give_the_slots_per_node(tasks, slots):
    assert hosts._slurm_slots(tasks, 3) == slots


@pytest.mark.parametrize(
    ("asked_for", "slots"),
    [({}, [1, 4]), ({"SLURM_GPUS_PER_NODE": "8"}, [8, 4]), ({"SLURM_GPUS_PER_NODE": "h100:2"}, [2, 4]),
     ({"SLURM_GPUS_ON_NODE": "2"}, [2, 4]), ({"SLURM_GPUS_PER_NODE": "0"}, [1, 4])],
)  # fmt: skip
def test_one_slurm_task_gets_a_rank_per_accelerator(asked_for, slots, tmp_path, monkeypatch):
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho n1; echo n2\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    found = slurm_hosts({"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_TASKS_PER_NODE": "1,4", **asked_for})
    assert found == [Host("n1", slots[0]), Host("n2", slots[1])]


def test_slurm_hosts_outside_an_allocation_are_refused():
    with pytest.raises(HostError, match="sbatch"):
        slurm_hosts({})
