"""Which device a process takes, under every launcher, and when it must not compute on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from bst_base.errors import UserError
from bst_dist.parallel import ranks
from bst_dist.parallel.devices import LOCAL_RANKS, cpu_refusal, device_files, local_rank


@pytest.mark.parametrize("name", LOCAL_RANKS)
def test_every_launcher_says_which_process_of_the_host_this_is(name):
    assert local_rank({name: "3"}) == 3
    assert local_rank({name: "3"} | {"LOCAL_RANK": "1"}) == 1  # what this project's launchers say comes first


def test_without_a_launcher_there_is_no_number():
    assert local_rank({}) is None


@pytest.mark.parametrize(
    ("environment", "count", "device"),
    [
        ({"OMPI_COMM_WORLD_LOCAL_RANK": "5"}, 8, 5),  # mpirun -n 8: not all on the first one
        ({"SLURM_LOCALID": "1"}, 1, 0),  # srun --gpus-per-task=1: each process sees its own alone
        ({}, 8, 0),
    ],
)
def test_a_process_takes_the_device_of_its_number(monkeypatch, environment, count, device):
    for name in LOCAL_RANKS:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert ranks.own_device(count) == device


def test_more_processes_than_devices_are_refused(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="no accelerator of its own: 2 are visible"):
        ranks.own_device(2)


def test_a_host_with_accelerators_is_not_computed_on_by_its_cpu_unless_told(tmp_path):
    assert cpu_refusal({}, tmp_path) is None
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert device_files(tmp_path) == ["nvidia0", "nvidia1"]
    assert "2 accelerators" in cpu_refusal({}, tmp_path)
    assert "2 accelerators" in cpu_refusal({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, tmp_path)
    assert cpu_refusal({"DS_ACCELERATOR": "cpu"}, tmp_path) is None
    assert cpu_refusal({"CUDA_VISIBLE_DEVICES": ""}, tmp_path) is None


def test_amds_devices_are_those_of_its_compute_driver(tmp_path, monkeypatch):
    """A render device alone may be any graphics card. They are named in their order, whatever the directory's is."""
    (tmp_path / "dri").mkdir()
    for name in ("renderD128", "renderD129", "card0"):
        (tmp_path / "dri" / name).touch()
    glob = Path.glob
    monkeypatch.setattr(Path, "glob", lambda path, pattern: sorted(glob(path, pattern), reverse=True))
    assert device_files(tmp_path) == []
    (tmp_path / "kfd").touch()
    assert device_files(tmp_path) == ["renderD128", "renderD129"]
