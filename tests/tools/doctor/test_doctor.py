from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections import namedtuple
from pathlib import Path

import pytest

from bst_dist.cli import main
from bst_dist.tools.doctor import command, machine, software
from bst_dist.tools.doctor.finding import BROKEN, GOOD, LACKING, ask, ask_python, broken, good

Usage = namedtuple("Usage", "total used free")


def marks(findings):
    return [finding.mark for finding in findings]


def test_a_check_that_fails_or_hangs_is_reported_on_one_line(monkeypatch, capsys, tmp_path):
    def fails():
        yield good("so far")
        raise OSError("no such device")

    never = threading.Event()
    checks = {"fails": fails, "hangs": lambda: iter([never.wait()]), "last": lambda: iter([good("well")])}
    monkeypatch.setattr(command, "CHECKS", checks)
    monkeypatch.setattr(command, "LIMIT_S", 0.2)
    assert main(["doctor", "--json", str(tmp_path / "report.json")]) == 0
    out = capsys.readouterr().out
    assert "! fails          could not be checked: OSError: no such device" in out
    assert "! hangs          did not finish in time" in out
    assert "✓ last           well" in out
    findings = json.loads((tmp_path / "report.json").read_text())["findings"]
    assert [(one["check"], one["mark"]) for one in findings] == [
        ("fails", GOOD),
        ("fails", LACKING),
        ("hangs", LACKING),
        ("last", GOOD),
    ]
    never.set()


def test_a_broken_finding_fails_the_doctor(monkeypatch, capsys):
    monkeypatch.setattr(command, "CHECKS", {"one": lambda: iter([broken("no torch", "pip install torch")])})
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "✗ one            no torch\n                 → pip install torch\n" in out
    assert "cannot train yet" in out


def test_a_command_that_does_not_end_is_stopped_after_the_limit():
    answer = ask(["sh", "-c", "echo begun; sleep 1000; true"], 3.0)
    assert (answer.status, answer.first_line) == (None, "begun")
    assert ask(["no-such-command"]).status is None
    with pytest.raises(RuntimeError, match="no answer within 1 s"):
        ask_python("import time; time.sleep(1000)", 1.0)
    with pytest.raises(RuntimeError, match="ValueError: odd"):
        ask_python("raise ValueError('odd')")


def test_missing_packages_are_broken_only_if_every_run_needs_them(monkeypatch):
    wanted = {"torch": "0.0.1", "no-such-package": "1.0", "pydantic": software.requirements()["pydantic"]}
    monkeypatch.setattr(software, "requirements", lambda: wanted)
    found = list(software.packages())
    assert marks(found) == [LACKING, LACKING, GOOD]
    assert found[0].remedy == "pip install no-such-package==1.0"
    assert "tested: 0.0.1" in found[1].text
    monkeypatch.setattr(software, "NEEDED", ("no-such-package",))
    assert BROKEN in marks(software.packages())


def test_packages_that_every_run_needs_are_pinned():
    assert set(software.NEEDED) <= software.requirements().keys()
    assert set(software.NAMED) <= software.requirements().keys()


def test_full_disks_and_small_limits_are_reported(monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(64 * 2**20, 0, 64 * 2**20))
    (memory,) = machine.shared_memory()
    (disk,) = machine.disk()
    assert (memory.mark, disk.mark) == (LACKING, LACKING)
    assert "64 MiB free" in memory.text
    monkeypatch.setattr("resource.getrlimit", lambda _: (1024, 2048))
    assert next((one.mark, one.remedy) for one in machine.limits()) == (LACKING, "ulimit -n 2048")


@pytest.mark.parametrize(
    ("devices", "driver", "mark", "text"),
    [
        ([], "", LACKING, "on the CPU"),
        ([], "580.1", LACKING, "sees GPUs, torch 2.0 does not"),
        ([["H100", 80 * 2**30]] * 2, "580.1", GOOD, "2 x H100, 80 GiB; driver 580.1; CUDA 13.0; NCCL 2.27"),
    ],
)
def test_accelerators_are_reported_with_driver_and_libraries(monkeypatch, devices, driver, mark, text):
    found = {"torch": "2.0", "devices": devices, **({"cuda": "13.0", "nccl": "2.27", "bf16": True} if devices else {})}
    answers = {machine._ACCELERATORS: found, machine._BF16: [1.0, 2.0]}
    monkeypatch.setattr(machine, "ask_python", answers.get)
    monkeypatch.setattr(machine, "_driver", lambda: driver)
    (line,) = machine.accelerators()
    assert line.mark == mark
    assert text in line.text


def test_a_cpu_that_is_slow_in_bf16_is_reported(monkeypatch):
    answers = {machine._ACCELERATORS: {"torch": "2.0", "devices": []}, machine._BF16: [23.4, 2.0]}
    monkeypatch.setattr(machine, "ask_python", answers.get)
    monkeypatch.setattr(machine, "_driver", lambda: "")
    _, slow = machine.accelerators()
    assert (slow.mark, slow.remedy) == (LACKING, "train.precision=fp32")
    assert "23 times as slowly in bf16" in slow.text


@pytest.mark.parametrize(("said", "named"), [("mpirun (Open MPI) 5.0.11", "Open MPI 5.0.11"), ("HYDRA 4.0.2", None)])
def test_mpirun_is_reported_with_its_implementation(monkeypatch, tmp_path, said, named):
    (tmp_path / "mpirun").write_text(f"#!/bin/sh\necho '{said}'\n")
    (tmp_path / "mpirun").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    (line,) = machine.launchers()
    assert (line.mark == GOOD and named in line.text) if named else line.mark == LACKING


def test_without_torch_the_doctor_reports_it_without_a_traceback(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('libtorch.so: cannot open shared object file')\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    bst = Path(sys.executable).with_name("bst")
    done = subprocess.run([bst, "doctor"], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 1, done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert "✗ ranks" in done.stdout
    assert "libtorch.so: cannot open" in done.stdout


@pytest.mark.ranks
def test_two_ranks_on_this_machine_can_compute_a_sum(capsys):
    assert main(["doctor"]) == 0
    assert "✓ ranks          a sum over 2 ranks on the CPU" in capsys.readouterr().out
