"""A sweep packed in a folder: its content, the order of runs, the collected results, also in an empty environment."""

from __future__ import annotations

import argparse
import base64
import csv
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import zipfile
from importlib import metadata
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement
from packaging.tags import parse_tag
from packaging.utils import parse_wheel_filename

from bst_base.errors import UserError
from bst_dist.study.pack import folder, results, wheels
from bst_dist.study.pack.contents import read_pack
from bst_dist.study.pack.machine import Machine
from bst_dist.study.pack.order import PRIOR, UNKNOWN, in_order_of_value
from bst_dist.study.runs.runner import Runner
from bst_dist.study.runs.state import RUNS, FailedStart, State
from bst_dist.study.sweep import table
from bst_dist.study.sweep.soundness import planned_gaps

ROOT = Path(__file__).resolve().parents[3]


def test_strata_are_ordered_by_information_gain_per_cost(sweep, planned):
    """Compared with least squares on pseudo-observations, with one more per coefficient for the prior."""
    config, runs = planned(sweep, depths=[2, 4], arms={"near": {}}, sizes=[5e4, 8e4])
    gaps = planned_gaps(runs, "sliding", "near")[0]
    of_stratum = {b: [r for r in runs if r.cell.stratum == b] for b in dict.fromkeys(r.cell.stratum for r in runs)}
    price = {b: sum(r.own_flops for r in own) for b, own in of_stratum.items()}
    logs = np.log(np.stack([gaps.flops, gaps.depth, gaps.tokens_per_parameter], 1))
    design = np.column_stack([np.ones(len(logs)), logs - logs.mean(0)])

    def unknown(strata):
        some = np.isin(gaps.stratum, strata)
        same = gaps.stratum[some][:, None] == gaps.stratum[some]
        noise = 2 * 0.007**2 * (0.7 * same + 0.3 * np.eye(some.sum()))
        whiten = np.linalg.inv(np.linalg.cholesky(noise)) if some.any() else np.zeros((0, 0))
        rows = np.concatenate([whiten @ design[some], np.diag([1 / UNKNOWN, *[1 / PRIOR] * 3])])
        spread = np.linalg.pinv(rows)
        of_change = (spread**2).sum(1)
        return np.log(10) ** 2 * of_change[1] + np.log(2) ** 2 * of_change[2]

    order = in_order_of_value(runs, lambda run: run.own_flops, config.noise, "sliding")
    assert sorted(run.name for run in order) == sorted(run.name for run in runs)
    strata = list(dict.fromkeys(run.cell.stratum for run in order))
    assert [run.cell.stratum for run in order] == [b for b in strata for _ in of_stratum[b]]  # no stratum is split
    for index, stratum in enumerate(strata):
        gains = {b: (unknown(strata[:index]) - unknown([*strata[:index], b])) / price[b] for b in strata[index:]}
        assert gains[stratum] == pytest.approx(max(gains.values()), rel=1e-6)
    depths = [of_stratum[stratum][0].cell.depth for stratum in strata]
    assert set(depths[:4]) == {2, 4}  # both are needed to estimate the effect of depth


def test_audits_run_after_their_size_and_trunks_before_branches(sweep, planned):
    config, runs = planned(sweep, audit={"factors": [2.0], "seeds": 2})
    order = in_order_of_value(runs, lambda run: run.own_flops, config.noise, "sliding")
    place = {run.name: index for index, run in enumerate(order)}
    assert all(place[run.trunk] < place[run.name] for run in order if run.trunk)
    for run in order:
        if run.cell.role == "audit":
            grid = [place[r.name] for r in order if r.cell.role == "grid" and r.cell.size == run.cell.size]
            assert place[run.name] > max(grid)
    assert len(order) == len(runs)


def test_the_folder_trains_the_same_runs_from_its_own_corpus(packed):
    pack, runs, path = packed
    jobs = read_pack(path).jobs(Path("/there"))
    assert {job.name for job in jobs} == {run.name for run in runs}  # so that results match the plan
    for job in jobs:
        assert str(job.recipe.data.corpus).startswith("/there/corpora/0-")
        assert job.recipe.train == next(run for run in runs if run.name == job.name).recipe.train
    known = [job.known for job in jobs if job.known]
    assert len(known) == 16
    assert {columns["ln_n_over_baseline"] for columns in known if columns["architecture"] == "sliding"} == {0.0}
    assert 0 < pack.expected <= len(runs)
    names = {file.name for file in path.iterdir()}
    assert names == {"code", "data.tar.xz", "pack.json", "pythons", "README.md", "run.py", "run.sh"}


def test_failed_pack_leaves_no_folder(sweep, planned, tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "gather", lambda *_: [])
    config, runs = planned(sweep)
    with pytest.raises(UserError, match=r"the folder would have .* MB, of which .* MB are the corpus"):
        folder.make(config, runs, tmp_path / "pack", 5, ["3.11"], 1000)
    assert not (tmp_path / "pack").exists()
    without = config.model_copy(update={"budget": config.budget.model_copy(update={"flops_per_s": None})})
    with pytest.raises(UserError, match=r"set budget\.flops_per_s"):
        folder.make(without, runs, tmp_path / "pack", 5, ["3.11"], 10**8)


def test_rebuilt_wheel_equals_the_installed_package(tmp_path):
    for name in ("hjson", "pyyaml", "braceexpand"):
        distribution = metadata.distribution(name)
        path = wheels.rebuild(distribution, tmp_path)
        assert parse_wheel_filename(path.name)[1].public == distribution.version
        stated = re.findall("^Tag: (.*)$", distribution.read_text("WHEEL"), re.MULTILINE)
        assert parse_wheel_filename(path.name)[3] == frozenset().union(*map(parse_tag, stated))
        with zipfile.ZipFile(path) as wheel:
            (record,) = (inside for inside in wheel.namelist() if inside.endswith(".dist-info/RECORD"))
            listed = {row[0]: row[1] for row in csv.reader(io.StringIO(wheel.read(record).decode()))}
            assert set(listed) == set(wheel.namelist())
            for inside in set(listed) - {record}:
                digest = base64.urlsafe_b64encode(hashlib.sha256(wheel.read(inside)).digest()).decode().rstrip("=")
                assert listed[inside] == f"sha256={digest}"
                assert wheel.read(inside) == Path(distribution.locate_file(inside)).read_bytes()


def test_packages_imported_by_training_are_packed(tmp_path):
    names = set(wheels.needed([wheels.HERE]))
    assert {"deepspeed", "pydantic", "pydantic-core", "pyyaml", "sentencepiece", "hjson"} <= names
    assert not names & {"torch", "numpy", "scipy", "matplotlib"}


def ended(state: State, name: str, **outcome: object) -> None:
    state.directory(name).mkdir(parents=True)
    (state.directory(name) / "recipe.yaml").write_text(f"name: {name}\n")
    (state.directory(name) / "metrics.jsonl").write_text('{"kind": "train"}\n')
    (state.directory(name) / "outcome.json").write_text(json.dumps(outcome))
    (state.directory(name) / "checkpoints").mkdir()
    (state.directory(name) / "checkpoints" / "weights").write_bytes(bytes(1000))


def test_results_are_restored_without_weights_and_only_for_requested_runs(tmp_path):
    there, here = State(tmp_path / "there", 0), State(tmp_path / "here", 0)
    for name in ("a", "b", "c"):
        ended(there, name, finished=True)
    attempt = FailedStart(status="failed", reason="a cable", exit_status=1, micro_sequences=4, time_s=1.0)
    there.record("b", attempt)
    results.write(tmp_path / "out", [], there, ["a", "b", "c", "never-started"], {}, "log")
    assert {f.name for f in (tmp_path / "out").iterdir()} == {
        "table.json",
        "table.csv",
        "summary.json",
        "log.txt",
        "runs-1.tar.xz",
    }
    assert results.restore(tmp_path / "out", here, {"a", "b"}.__contains__) == ["a", "b"]
    assert results.restore(tmp_path / "out", here, {"a", "b"}.__contains__) == []
    assert here.failed_starts("b") == [attempt]
    assert {f.name for f in here.directory("a").iterdir()} == {"recipe.yaml", "metrics.jsonl", "outcome.json"}
    assert not here.directory("c").exists()
    (tmp_path / "out" / "runs-1.tar.xz").write_bytes(b"no archive")
    with pytest.raises(UserError, match=r"runs-1\.tar\.xz: damaged"):
        results.restore(tmp_path / "out", here, bool)
    with pytest.raises(UserError, match="no results of a packed sweep there"):
        results.restore(tmp_path, here, bool)


def test_runs_that_exceed_the_size_limit_are_listed(tmp_path, monkeypatch):
    state = State(tmp_path, 0)
    random = np.random.default_rng(0)
    for name in "abcdefgh":
        ended(state, name, finished=True)
        (state.directory(name) / "metrics.jsonl").write_bytes(random.bytes(20_000))
    monkeypatch.setattr(results, "MOST_BYTES", 25_000)
    results.write(tmp_path / "out", [], state, "abcdefgh", {}, "log")
    files = list((tmp_path / "out").iterdir())
    assert len(files) == 8
    assert max(file.stat().st_size for file in files) <= 25_000
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["left_out"] == list("efgh")


STAND_IN = """
import json, pathlib, sys, time
what, run = sys.argv[1], pathlib.Path(sys.argv[-2])
if what == "fail":
    sys.exit("RuntimeError: no kernel image is available")
run.mkdir(exist_ok=True)
(run / "recipe.yaml").write_text(pathlib.Path(sys.argv[2]).read_text())
(run / "environment.json").write_text(json.dumps({"starts": [{"versions": {"torch": "x"}}]}))
line = {"kind": "train", "step": 1, "tokens": 256, "step_time_s": 1.0}
end = {"kind": "eval", "step": 1, "loss_nats": 2.0, "bits_per_byte": 1.0, "loss_by_block": [2.0]}
(run / "metrics.jsonl").write_text(json.dumps(line) + chr(10) + json.dumps(end) + chr(10))
if what == "hang":
    time.sleep(100)
(run / "checkpoints").mkdir(exist_ok=True)
(run / "outcome.part").write_text(json.dumps({"finished": True}))
(run / "outcome.part").rename(run / "outcome.json")
"""


@pytest.fixture
def machine(packed, tmp_path, monkeypatch):
    """Function that runs the folder's jobs with a stand-in for training, which ends as the test says."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    monkeypatch.setattr("bst_dist.study.runs.runner.POLL_S", 0.02)
    monkeypatch.setattr("bst_dist.study.pack.machine.END_S", 0.0)

    def train(what, minutes=60.0, state="state", **others):  # far more than needed, even on a busy machine
        monkeypatch.setattr(
            Runner,
            "_command",
            lambda self, run, micro: [
                sys.executable,
                str(tmp_path / "stand_in.py"),
                what,
                str(self.state.path("recipes", run.name)),
                str(self.state.directory(run.name)),
                "--resume",
            ],
        )
        args = argparse.Namespace(
            folder=packed[2],
            out=tmp_path / "back",
            state=tmp_path / state,
            results=None,
            minutes=minutes,
            side_by_side=4,
        )
        for name, value in others.items():
            setattr(args, name, value)
        made = Machine(read_pack(packed[2]), args)
        return made, made.train()

    return train


def test_packed_sweep_stops_early_if_all_first_runs_fail(machine, tmp_path):
    with pytest.raises(UserError, match="all failed, so the others are not tried: RuntimeError: no kernel image"):
        machine("fail")
    assert "no kernel image" in (tmp_path / "back" / "log.txt").read_text()
    rows = table.read(tmp_path / "back" / "table.json")
    assert {row.status for row in rows} == {"failed"}  # the trunks, and with them their branches


def test_runs_of_a_packed_folder_know_their_commit(sweep, planned, tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "gather", lambda *_: [])
    monkeypatch.setattr(folder, "versions", lambda: {"bst_dist": "1", "commit": "abc-dirty"})
    config, runs = planned(sweep)
    folder.make(config, runs, tmp_path / "pack", 5, ["3.11"], 10**8)
    command = [sys.executable, "-c", "from bst_dist.version import versions; print(versions()['commit'])"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "pack" / "code")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip() == "abc-dirty"


def test_time_limit_ends_a_part_and_finished_runs_are_skipped_later(machine, packed, tmp_path):
    made, status = machine("hang", minutes=0.02)
    assert status == 0
    assert made.state.counts(made.jobs) == {"waiting": 24}
    first = packed[0].runs[0]["recipe"]["name"]
    shutil.rmtree(tmp_path / "state")
    made, _ = machine("done")
    assert made.state.counts(made.jobs) == {"done": 24}
    assert not (made.state.directory(first) / "checkpoints").exists()  # its weights are no longer needed
    rows = table.read(tmp_path / "back" / "table.json")
    assert [row.loss_nats for row in rows] == [2.0] * 16
    assert [row.run for row in rows] == [run["recipe"]["name"] for run in packed[0].runs if run["known"]]
    (tmp_path / "back").rename(tmp_path / "carried")
    made, _ = machine("fail", state="another", results=tmp_path / "carried")
    assert made.state.counts(made.jobs) == {"done": 24}


@pytest.mark.parametrize("moved", [1, 2])
def test_taking_over_earlier_results_continues_after_a_kill(machine, tmp_path, monkeypatch, moved):
    """A trunk without its branches would be of no use: it has no weights to branch off."""
    machine("done")
    (tmp_path / "back").rename(tmp_path / "carried")
    original, moves = Path.replace, []

    def replace(self: Path, target: Path) -> Path:
        if self.parents[1].name == "elsewhere" and target.parent.name == RUNS:
            if len(moves) == moved:
                raise KeyboardInterrupt
            moves.append(target)
        return original(self, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", replace)
        machine("fail", state="another", results=tmp_path / "carried")
    made, _ = machine("fail", state="another", results=tmp_path / "carried")
    assert made.state.counts(made.jobs) == {"done": 24}


def empty_environment(path: Path) -> Path:
    """Make a virtual environment with only pip, torch, its dependencies and numpy; return its Python."""
    subprocess.run([sys.executable, "-m", "venv", path], check=True)
    (site,) = (path / "lib").glob("python*/site-packages")
    packages, waiting, done = Path(sysconfig.get_path("purelib")), ["torch", "numpy"], {"setuptools", "pip"}
    while waiting:
        name = waiting.pop()
        if name in done:
            continue
        done.add(name)
        distribution = metadata.distribution(name)
        tops = {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}
        for top in tops:
            if not (site / top).exists():
                (site / top).symlink_to(packages / top)
        waiting += [
            r.name for r in map(Requirement, distribution.requires or []) if not r.marker or r.marker.evaluate()
        ]
    return path / "bin" / "python"


def until(process: subprocess.Popen[str], word: str, times: int) -> list[str]:
    """Return the lines that a process prints until a word has occurred in `times` lines."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if sum(word in each for each in lines) == times:
            return lines
    raise AssertionError("".join(lines))


@pytest.mark.ranks
@pytest.mark.long
def test_packed_sweep_continues_in_an_empty_environment_after_a_kill(sweep, corpus, tmp_path):
    """The steps of a user: pack, train in an empty environment, kill, continue, stop, collect."""
    bst = Path(sys.executable).with_name("bst")
    words = [str(tmp_path / "sweep.yaml"), "--output", str(tmp_path / "made"), "--minutes", "5"]
    subprocess.run([bst, "sweep", "pack", *words], check=True, cwd=ROOT, timeout=600)
    (tmp_path / "made").rename(tmp_path / "carried")
    python = empty_environment(tmp_path / "venv")
    hidden = corpus.rename(corpus.with_name("hidden"))  # only the folder is left
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"PYTHON": str(python), "OMP_NUM_THREADS": "1"}

    def run(minutes: float) -> subprocess.Popen[str]:
        command = ["./run.sh", "--minutes", str(minutes), "--out", str(tmp_path / "back"), "--side-by-side", "2"]
        return subprocess.Popen(command, cwd=tmp_path / "carried", env=environment, text=True, stdout=subprocess.PIPE)

    try:
        process = run(30)
        done = [line.split()[3] for line in until(process, "done", 2) if " done " in line]
        process.send_signal(signal.SIGKILL)
        process.wait()
        process = run(30)
        lines = until(process, " done ", 3)
        assert not [name for name in done if any(f"done {name}" in line for line in lines)]  # no run is trained twice
        process.terminate()
        process.wait(timeout=600)
    finally:
        process.kill()
        hidden.rename(corpus)
    files = list((tmp_path / "back").iterdir())
    assert len(files) <= 8
    assert json.loads((tmp_path / "back" / "summary.json").read_text())["runs"]["done"] >= 5
    collected = subprocess.run([bst, "sweep", "collect", words[0], "--from", tmp_path / "back"], cwd=ROOT, timeout=600)
    assert collected.returncode == 0
    here = {row.run: row for row in table.read(tmp_path / "out" / "table.json")}
    there = [row for row in table.read(tmp_path / "back" / "table.json") if row.status == "done"]
    assert there
    for row in there:
        assert row.model_dump() == here[row.run].model_dump()
        assert 0 < row.loss_nats < 6.5
    for one, other in pairwise(sorted(there, key=lambda row: row.run)):
        assert one.loss_nats != other.loss_nats
