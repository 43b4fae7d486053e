"""Environment variables that the ranks of all hosts get, and variables that they must not get."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from bst_dist.cli import main
from bst_dist.cluster.environment import (
    NAMES,
    PREFIXES,
    EnvironmentFileError,
    collect_environment,
    explain_not_passed_on,
    format_environment,
    read_file,
)

ROOT = Path(__file__).resolve().parents[2]


def test_only_variables_that_concern_the_ranks_are_passed_on(tmp_path):
    concerns = {
        "NCCL_DEBUG": "WARN",
        "AWS_REGION": "x",
        "CUDA_LAUNCH_BLOCKING": "1",
        "LD_LIBRARY_PATH": "/opt/lib",
        "WANDB_MODE": "offline",
        "MLFLOW_TRACKING_URI": "http://host:5000",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "CUBLAS_WORKSPACE_CONFIG": ":16:8",
        "TORCHINDUCTOR_CACHE_DIR": "/local/1",
        "TRITON_CACHE_DIR": "/local/2",
        "HSA_FORCE_FINE_GRAIN_PCIE": "1",
        "MIOPEN_USER_DB_PATH": "/local/3",
        "RCCL_MSCCL_ENABLE": "0",
        "HIP_LAUNCH_BLOCKING": "1",
    }
    devices = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL")
    other = {"HOME": "/root", "RANK": "3", "SLURM_PROCID": "1", **dict.fromkeys(devices, "0")}
    assert collect_environment(concerns | other, [tmp_path]) == concerns
    told = explain_not_passed_on(concerns | other)
    assert [line.split(" applies to this machine only")[0] for line in told] == [f"{name}=0" for name in devices]
    assert explain_not_passed_on(concerns) == []


@pytest.mark.parametrize("path", ["docs/operations.md", "launch/cluster/environment.sh", "bst_dist/cluster/launch.py"])
def test_every_text_that_lists_the_variables_lists_all(path):
    text = (ROOT / path).read_text()
    assert [name for name in PREFIXES + NAMES if not re.search(rf"\b{name}(?![A-Z])", text)] == []


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("A=1", "1"),
        ("export A=1", "1"),
        ("  A = 1  ", "1"),
        ('A="two words"', "two words"),
        ("A='it is # one'", "it is # one"),
        ("A=1 # why", "1"),
        ("A=b=c", "b=c"),
        ("A=", ""),
        ("A=/new:$LD_LIBRARY_PATH", "/new:/old"),
    ],
)
def test_the_environment_file_is_read_as_by_the_deepspeed_launcher(tmp_path, line, value):
    path = tmp_path / ".deepspeed_env"
    path.write_text(f"# variables\n\n{line}\n")
    assert read_file(path, {"LD_LIBRARY_PATH": "/old"}) == {"A": value}


@pytest.mark.parametrize("line", ["A", "2A=1", "A='open", "some words = 1"])
def test_an_invalid_line_of_the_file_is_named(tmp_path, line):
    path = tmp_path / ".deepspeed_env"
    path.write_text(f"B=1\n{line}\n")
    with pytest.raises(EnvironmentFileError, match=":2: "):
        read_file(path)


@pytest.mark.parametrize("line", ["MY_TOKEN='hunter2", "MY TOKEN=hunter2"])
def test_the_value_in_an_invalid_line_is_not_shown(tmp_path, line):
    path = tmp_path / ".deepspeed_env"
    path.write_text(f"{line}\n")
    with pytest.raises(EnvironmentFileError, match="TOKEN") as told:
        read_file(path)
    assert "hunter2" not in str(told.value)


def test_set_variables_take_precedence_over_the_file(tmp_path):
    (tmp_path / "other").write_text("NCCL_DEBUG=INFO\nMY_OWN=1\n")
    found = collect_environment({"NCCL_DEBUG": "WARN", "DS_ENV_FILE": "other"}, [tmp_path])
    assert found == {"NCCL_DEBUG": "WARN", "MY_OWN": "1", "DS_ENV_FILE": "other"}


def test_a_file_that_was_named_and_is_missing_is_reported(tmp_path):
    given, tried = {"DS_ENV_FILE": "other"}, f"{tmp_path}/other, {tmp_path}/b/other"
    with pytest.raises(EnvironmentFileError, match=f"DS_ENV_FILE=other: no such file: {tried}"):
        collect_environment(given, [tmp_path, tmp_path / "b"])
    (tmp_path / "other").write_text("A=1\n")
    assert collect_environment(given, [tmp_path, tmp_path / "b"]) == {"A": "1", **given}


@pytest.mark.parametrize(
    "name",
    [
        "AWS_SECRET_ACCESS_KEY",
        "WANDB_API_KEY",
        "MY_KEY",
        "MLFLOW_TRACKING_PASSWORD",
        "hf_token",
        "AWS_SHARED_CREDENTIALS",
    ],
)
def test_secrets_are_not_shown(name):
    assert format_environment({name: "abc", "A": "1"}) in (f"A=1 {name}=...", f"{name}=... A=1")


def test_a_password_in_the_address_of_a_tracking_server_is_not_shown(recipe, tmp_path, monkeypatch, capsys):
    (tmp_path / "hosts").write_text("node-01 slots=2\n")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:hunter2@tracking.example/api?token=hunter3")
    report = tmp_path / "report.json"
    assert (
        main(
            [
                "launch",
                str(recipe(6)),
                "--hostfile",
                str(tmp_path / "hosts"),
                "--dry-run",
                "--run-dir",
                str(tmp_path / "run"),
                "--json",
                str(report),
            ]
        )
        == 0
    )
    said = capsys.readouterr().out
    assert "MLFLOW_TRACKING_URI=https://me:…@tracking.example/api?token=…" in said
    assert "hunter" not in said + report.read_text()


def test_ds_accelerator_of_the_launching_host_is_not_passed_on(recipe, tmp_path):
    """Runs the whole command in a separate process: variables set by imports must not be passed to the ranks."""
    (tmp_path / "hosts").write_text("node-01 slots=2\n")
    program = (
        "import os, sys; os.environ.pop('DS_ACCELERATOR', None); from bst_dist.cli import main; sys.exit(main("
        f"['launch', {str(recipe(6))!r}, '--hostfile', {str(tmp_path / 'hosts')!r}, '--dry-run',"
        f" '--run-dir', {str(tmp_path / 'run')!r}]))"
    )
    said = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert "environment" in said.stdout, said.stderr
    assert "DS_ACCELERATOR" not in said.stdout
