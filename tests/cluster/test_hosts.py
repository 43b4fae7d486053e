"""Lists of hosts, from a file and from Slurm."""

from __future__ import annotations

import pytest

from bst_dist.cluster import hosts
from bst_dist.cluster.hosts import Host, HostError, read_hostfile, slurm_hosts


def test_a_hostfile_keeps_its_order_and_passes_over_comments(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("# the rack at the window\nnode-02 slots=8\n\n  node-01   slots=4  # half of it\n")
    assert read_hostfile(path) == [Host("node-02", 8), Host("node-01", 4)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("node-01\n", "hosts:1: 'node-01' is not a host"),
        ("a slots=1\nb slots=0\n", "hosts:2"),
        ("a slots=two\n", "hosts:1"),
        ("a slots=1\na slots=1\n", "a stands there twice"),
        ("# nothing\n", "names no host"),
    ],
)
def test_a_bad_line_is_named(tmp_path, text, said):
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(HostError, match=said):
        read_hostfile(tmp_path / "hosts")


def test_a_missing_hostfile_is_an_error_of_the_user(tmp_path):
    with pytest.raises(HostError, match="cannot be read"):
        read_hostfile(tmp_path / "none")


@pytest.mark.parametrize(("tasks", "slots"), [("8(x3)", [8, 8, 8]), ("2,1(x2)", [2, 1, 1]), ("4(x2),1", [4, 4, 1])])
def test_slurm_says_how_many_tasks_each_node_has(tasks, slots):
    assert hosts._slurm_slots(tasks, 3) == slots


def test_outside_an_allocation_there_are_no_hosts():
    with pytest.raises(HostError, match="sbatch"):
        slurm_hosts({})
