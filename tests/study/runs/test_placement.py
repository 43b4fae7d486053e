"""Placement of runs on hosts and in Slurm, with stubs for ssh, sbatch, scontrol and the command of a run."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from bst_dist.cli import main
from bst_dist.cluster.hosts import Host
from bst_dist.study.runs import placement

WORDS = ["sweep", "run", "sweep.yaml", "settings.data={corpus: a b}"]


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Function that puts a shell script on the PATH."""
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")

    def put(name: str, script: str) -> Path:
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\n{script}\n")
        path.chmod(0o755)
        return path

    return put


def test_each_host_runs_the_command_with_workers_for_its_slots(program, tmp_path):
    program("ssh", 'while [[ $1 == -* ]]; do [ "$1" = -o ] && shift; shift; done; echo "$1 $2"')
    said = []
    commands = {
        host.name: placement.on_host(host, 8, tmp_path / "a b", WORDS) for host in (Host("one", 8), Host("two", 17))
    }
    assert placement.run_on_hosts(commands, said.append) == {"one": 0, "two": 0}
    for name, workers in (("one", 1), ("two", 2)):
        line = next(line for line in said if line.startswith(f"{name}: {name} "))
        words = shlex.split(line)
        assert words[2:6] == ["cd", str(tmp_path / "a b"), "&&", "exec"]
        assert words[6:] == [sys.executable, "-m", "bst_dist", *WORDS, "--workers", str(workers)]


def test_status_and_output_of_each_host_are_reported(program):
    commands = {"good": ["bash", "-c", "echo fine; echo; echo done"], "bad": ["bash", "-c", "echo oh >&2; exit 3"]}
    said = []
    assert placement.run_on_hosts(commands, said.append) == {"good": 0, "bad": 3}
    assert sorted(said) == ["bad: oh", "good: done", "good: fine"]


def test_a_host_too_small_for_one_run_is_refused():
    with pytest.raises(placement.PlacementError, match="two has 4 slots and a run needs 8"):
        placement.on_host(Host("two", 4), 8, Path("/"), WORDS)


def script_of(monkeypatch, tmp_path, command: str, options=()) -> Path:
    monkeypatch.setattr(placement, "_bst", lambda words: [command])
    path = tmp_path / "job.sh"
    path.write_text(placement.slurm_script("t", tmp_path, 4, tmp_path, WORDS, options))
    return path


@pytest.mark.parametrize("status", [0, 1])
def test_slurm_script_returns_the_status_of_its_command(monkeypatch, tmp_path, program, status):
    path = script_of(monkeypatch, tmp_path, str(program("sweep", f"exit {status}")), ["--gres=gpu:8"])
    assert subprocess.run(["bash", path], check=False).returncode == status
    text = path.read_text()
    assert "#SBATCH --array=0-3\n" in text
    assert "#SBATCH --gres=gpu:8\n" in text


def test_slurm_script_waits_for_its_command_after_sigterm_and_requeues(monkeypatch, tmp_path, program):
    waits = f"trap 'sleep 0.3; echo saved > {tmp_path}/saved; exit 130' TERM; touch {tmp_path}/up; sleep 60 & wait"
    program("scontrol", f'echo "$@" "$(cat {tmp_path}/saved)" > {tmp_path}/requeued')
    path = script_of(monkeypatch, tmp_path, str(program("sweep", waits)))
    ids = {"SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"}
    job = subprocess.Popen(["bash", path], env={**os.environ, **ids})
    while not (tmp_path / "up").exists():
        time.sleep(0.02)
    job.send_signal(signal.SIGTERM)
    assert job.wait() == 0
    assert (tmp_path / "requeued").read_text() == "requeue 12_3 saved\n"


def test_submit_passes_the_script_to_sbatch_and_returns_its_output(tmp_path, program):
    program("sbatch", "cat $1; echo Submitted batch job 7")
    assert placement.submit("#!/bin/bash\n", tmp_path) == "#!/bin/bash\nSubmitted batch job 7"
    program("sbatch", "echo no such partition >&2; exit 1")
    with pytest.raises(placement.PlacementError, match="no such partition"):
        placement.submit("#!/bin/bash\n", tmp_path)


def test_a_dry_run_shows_every_command_and_starts_nothing(tmp_path, program, capsys):
    program("ssh", f"touch {tmp_path}/started")
    program("sbatch", f"touch {tmp_path}/started")
    base = {
        "model": {"block": 32, "vocab_size": 300},
        "data": {"corpus": "none"},
        "train": {"sequence_length": 64, "sequences": 4, "micro_sequences": 4, "precision": "fp32"},
    }
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    settings = {
        "name": "t",
        "recipe": "base.yaml",
        "directory": str(tmp_path / "out"),
        "baseline": "sliding",
        "architectures": {"sliding": {"model.mixer": "sliding"}, "bst": {"model.mixer": "bst"}},
        "depths": [2],
        "sizes": [5e4, 1e5],
        "tokens_per_parameter": [1, 2],
        "seeds": [0, 1],
        "shape": {"head_width": 4},
        "arms": {"all": {}},
    }
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(settings))
    (tmp_path / "hosts").write_text("one slots=2\n")
    run = ["sweep", "run", str(tmp_path / "sweep.yaml"), "--dry-run"]
    assert main(run) == 0
    out = capsys.readouterr().out
    assert "24 of 24 runs would be trained; nothing was started" in out
    assert out.count("waiting") == 24
    assert main([*run, "--hostfile", str(tmp_path / "hosts")]) == 0
    assert "--workers 2" in capsys.readouterr().out
    assert main([*run, "--slurm", "3", "--sbatch=--time=1:00:00"]) == 0
    assert "#SBATCH --time=1:00:00" in capsys.readouterr().out
    assert main(["sweep", "run", str(tmp_path / "sweep.yaml"), "--sbatch=--time=1"]) == 2
    assert "--sbatch means nothing without --slurm" in capsys.readouterr().err
    assert not (tmp_path / "started").exists() and not (tmp_path / "out").exists()
