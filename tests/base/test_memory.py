"""The memory that a process may still take, in made-up files of the kernel."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from bst_base import memory

MB = 10**6
MEMINFO = "MemTotal:       9000000 kB\nMemFree:          10000 kB\nMemAvailable:    4000000 kB\n"
HOST = 4000000 * 1024
STAT = {"": "anon 5\nactive_file 3000000\ninactive_file 1000000\n", "total_": "inactive_file 7\ntotal_cache 9\n"}
STAT["total_"] += "total_active_file 3000000\ntotal_inactive_file 1000000\n"


@pytest.fixture
def kernel(tmp_path, monkeypatch) -> Path:
    """A folder in place of /: with `proc/meminfo`, and without control groups."""
    for name in ("proc/self", "groups"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text(MEMINFO)
    monkeypatch.setattr(memory, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "_GROUPS", tmp_path / "groups")
    return tmp_path


def group(folder: Path, version: int, limit: object, used: int) -> None:
    """Write a control group's files."""
    names = {1: ("limit_in_bytes", "usage_in_bytes"), 2: ("max", "current")}[version]
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in zip(names, (limit, used), strict=True):
        (folder / f"memory.{name}").write_text(f"{value}\n")
    (folder / "memory.stat").write_text(STAT["total_" if version == 1 else ""])


def test_without_control_groups_the_host_counts(kernel):
    assert memory.available_memory() == HOST


@pytest.mark.parametrize(("version", "line", "top"), [(1, "4:cpu,memory:", "groups/memory"), (2, "0::", "groups")])
@pytest.mark.parametrize("limited", ["", "job", "job/step/task"])
def test_the_limit_of_a_group_counts_wherever_it_is_set_and_file_pages_are_free(kernel, version, line, top, limited):
    (kernel / "proc/self/cgroup").write_text(f"7:pids:/elsewhere\n{line}/job/step/task\n")
    for path in ("", "job", "job/step", "job/step/task"):
        group(kernel / top / path, version, "max" if version == 2 else 9223372036854771712, 100 * MB)
    assert memory.available_memory() == HOST
    group(kernel / top / limited, version, 300 * MB, 100 * MB)
    assert memory.available_memory() == 204 * MB
    group(kernel / top / limited, version, 300 * MB, 400 * MB)
    assert memory.available_memory() == 0


@pytest.mark.parametrize("path", ["/kubepods/pod/container", "/../outside"])
def test_in_a_container_the_top_folder_is_its_own_group(kernel, path):
    (kernel / "proc/self/cgroup").write_text(f"0::{path}\n")
    group(kernel / "groups", 2, 300 * MB, 100 * MB)
    assert memory.available_memory() == 204 * MB


def test_what_cannot_be_read_does_not_count(kernel):
    (kernel / "proc/self/cgroup").write_text("0::/job\n")
    (kernel / "groups/job").mkdir()
    (kernel / "groups/job/memory.max").write_text("12\n")  # without the memory in use
    assert memory.available_memory() == HOST
    (kernel / "proc/meminfo").unlink()
    assert memory.available_memory() is None


def test_this_host_has_less_than_its_whole_memory():
    assert 0 < memory.available_memory() < psutil.virtual_memory().total
