"""Which device a process uses under every launcher, and when it must not compute on the CPU."""

from __future__ import annotations

import importlib
import os
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bst_base.errors import UserError
from bst_dist.parallel import ranks
from bst_dist.parallel.devices import LOCAL_RANKS, cpu_refusal, device_files, local_rank


@pytest.mark.parametrize("name", LOCAL_RANKS)
def test_the_local_rank_is_read_from_every_launcher(name):
    assert local_rank({name: "3"}) == 3
    assert local_rank({name: "3"} | {"LOCAL_RANK": "1"}) == 1  # this project's launchers take precedence


def test_without_a_launcher_there_is_no_local_rank():
    assert local_rank({}) is None


@pytest.mark.parametrize(
    ("environment", "count", "device"),
    [
        ({"OMPI_COMM_WORLD_LOCAL_RANK": "5"}, 8, 5),  # mpirun -n 8: not all on the first device
        ({"SLURM_LOCALID": "1"}, 1, 0),  # srun --gpus-per-task=1: each process sees only its own
        ({"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"}, 1, 0),
        ({}, 8, 0),
    ],
)
def test_a_process_uses_the_device_of_its_local_rank(monkeypatch, environment, count, device):
    for name in (*LOCAL_RANKS, "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert ranks.own_device(count) == device


class _OneDevice:
    """Stub of DeepSpeed's accelerator in a process that sees one CUDA device; records which devices are set."""

    def __init__(self) -> None:
        self.taken: list[torch.device] = []

    def device_name(self, index: int | None = None) -> str:
        return "cuda" if index is None else f"cuda:{index}"

    def device_count(self) -> int:
        return 1

    def device(self, index: int) -> torch.device:
        return torch.device("cuda", index)

    def set_device(self, index: int) -> None:
        self.taken.append(self.device(index))


class _JoinedError(Exception):
    """Raised where the process group would be initialised."""


def _as_process(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    """Set `environment` as the only variables of launchers; the old environment is restored after the test."""
    said = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMPI_COMM_WORLD_RANK", *LOCAL_RANKS}
    monkeypatch.setattr(os, "environ", {key: value for key, value in os.environ.items() if key not in said})
    os.environ |= environment


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},  # srun
        {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "3"},  # mpirun
    ],
)
def test_deepspeed_uses_the_only_visible_device_of_a_process(monkeypatch, environment):
    """DeepSpeed uses LOCAL_RANK as the device number, in the process group and in its engine."""
    from bst_dist.parallel.deepspeed_import import deepspeed

    accelerator, comm, engine = _OneDevice(), deepspeed.comm.comm, deepspeed.runtime.engine
    backend = importlib.import_module("deepspeed.comm.torch")  # `deepspeed.comm.torch` as an attribute is torch itself

    def join(**named: object) -> None:
        if "RANK" not in os.environ:
            comm.mpi_discovery(named["distributed_port"])
        backend.TorchBackend.init_process_group(SimpleNamespace(), "nccl", timedelta(1), "env://", -1, -1)

    def init_process_group(backend: str, device_id: torch.device, **_: object) -> None:
        assert device_id == torch.device("cuda", 0)
        raise _JoinedError

    def mpi_discovery(distributed_port: int, verbose: bool = True) -> None:
        os.environ |= {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3", "MASTER_ADDR": "127.0.0.1"}
        os.environ["MASTER_PORT"] = str(distributed_port)

    _as_process(monkeypatch, environment)
    for module in (deepspeed.accelerator, backend, engine):
        monkeypatch.setattr(module, "get_accelerator", lambda: accelerator)
    monkeypatch.setattr(deepspeed, "init_distributed", join)
    monkeypatch.setattr(comm, "mpi_discovery", mpi_discovery)
    monkeypatch.setattr(torch.distributed, "init_process_group", init_process_group)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    monkeypatch.setattr(ranks, "pci_of_device", lambda: None)
    monkeypatch.setattr(ranks, "gathered", nullcontext)
    monkeypatch.setattr(ranks, "agreed_port", lambda: 2)
    with pytest.raises(_JoinedError):
        ranks.Ranks()
    built = SimpleNamespace()
    engine.DeepSpeedEngine._configure_with_arguments(built, None, None)
    monkeypatch.setattr(engine.dist, "get_world_size", lambda: 4)
    monkeypatch.setattr(engine.dist, "get_rank", lambda: 3)
    engine.DeepSpeedEngine._set_distributed_vars(built, None)
    assert built.device == torch.device("cuda", 0)
    assert set(accelerator.taken) == {torch.device("cuda", 0)}


def test_more_processes_than_devices_are_refused(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="no accelerator of its own: 2 are visible"):
        ranks.own_device(2)


def test_ranks_that_see_one_device_do_not_share_it(monkeypatch):
    """As with `bst train --ranks 8` where CUDA_VISIBLE_DEVICES shows one: all ranks have the same environment."""
    monkeypatch.setenv("LOCAL_RANK", "5")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(UserError, match="process 5 of this host has no accelerator of its own: 1 is visible to it"):
        ranks.own_device(1)


def test_cpu_use_on_a_host_with_accelerators_needs_an_explicit_setting(tmp_path):
    assert cpu_refusal({}, tmp_path) is None
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert device_files(tmp_path) == ["nvidia0", "nvidia1"]
    assert "2 accelerators" in cpu_refusal({}, tmp_path)
    assert "2 accelerators" in cpu_refusal({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, tmp_path)
    assert cpu_refusal({"DS_ACCELERATOR": "cpu"}, tmp_path) is None
    assert cpu_refusal({"CUDA_VISIBLE_DEVICES": ""}, tmp_path) is None


def test_amd_devices_need_the_compute_driver_and_are_sorted(tmp_path, monkeypatch):
    """A render device without the compute driver may be any graphics card. The devices are sorted by name."""
    (tmp_path / "dri").mkdir()
    for name in ("renderD128", "renderD129", "card0"):
        (tmp_path / "dri" / name).touch()
    glob = Path.glob
    monkeypatch.setattr(Path, "glob", lambda path, pattern: sorted(glob(path, pattern), reverse=True))
    assert device_files(tmp_path) == []
    (tmp_path / "kfd").touch()
    assert device_files(tmp_path) == ["renderD128", "renderD129"]
