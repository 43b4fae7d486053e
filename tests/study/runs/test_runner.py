"""Running and collecting runs, with a stand-in for training that fails as the test says, and once for real."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from bst_base.errors import UserError
from bst_base.settings import parse
from bst_dist.faults.lease import acquire
from bst_dist.study.laws.advantage import QUIET
from bst_dist.study.report import document
from bst_dist.study.runs.command import Study, show_status
from bst_dist.study.runs.runner import SAVING_S, Runner, Worker
from bst_dist.study.runs.state import State
from bst_dist.study.sweep import present, table
from bst_dist.study.sweep.collect import collect
from bst_dist.study.sweep.config import SweepConfig
from bst_dist.study.sweep.design import Designer

ROOT = Path(__file__).resolve().parents[3]

STAND_IN = """
import json, pathlib, sys, yaml
recipe_file, override, _, run_dir, _ = sys.argv[1:]
run, micro = pathlib.Path(run_dir), int(override.partition("=")[2])
recipe = yaml.safe_load(pathlib.Path(recipe_file).read_text())
recipe["train"]["micro_sequences"] = micro
told = json.loads(pathlib.Path(%r).read_text())
def whole(path, text):  # at once, as training writes it: the runner reads at any moment
    path.with_suffix(".part").write_text(text)
    path.with_suffix(".part").rename(path)
for part, what in told.items():
    if part in run.name:
        if what == "oom" and micro > 1:
            run.mkdir(exist_ok=True)
            sys.exit("torch.OutOfMemoryError: out of memory")
        if what == "fail":
            sys.exit("Segmentation fault somewhere")
        if what.startswith("stop"):
            marks = list(run.parent.glob(run.name + ".stop*"))
            if len(marks) < int(what[4:]):
                (run.parent / f"{run.name}.stop{len(marks)}").touch()
                sys.exit(75)
        if what == "once":
            mark = run.parent / (run.name + ".mark")
            if not mark.exists():
                mark.touch()
                sys.exit("a node was lost")
run.mkdir(exist_ok=True)
(run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
(run / "environment.json").write_text(json.dumps({"starts": [{"versions": {"torch": "x"}}]}))
if any(part in run.name and what == "diverge" for part, what in told.items()):
    whole(run / "outcome.json", json.dumps({"finished": False, "diverged": "the loss is nan in step 3"}))
    sys.exit(2)
steps, branch = recipe["train"]["steps"], recipe["branch"]
train, first = recipe["train"], branch["step"] if branch else 0
tokens = train["sequences"] * train["sequence_length"]
lines = [{"kind": "train", "step": s + 1, "tokens": tokens * (s + 1), "step_time_s": 1.0} for s in range(first, steps)]
loss = 3 * (tokens * steps) ** -0.05 - 0.01 * (recipe["model"]["mixer"] == "bst") + 0.001 * recipe["seed"]
end = {"kind": "eval", "step": steps, "loss_nats": loss, "bits_per_byte": loss / 2, "loss_by_block": [loss, loss]}
(run / "metrics.jsonl").write_text("".join(json.dumps(line) + chr(10) for line in [*lines, end]))
whole(run / "outcome.json", json.dumps({"finished": True}))
"""


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """Function that runs a small plan with a stand-in for training, which ends as the test says."""
    base = {
        "model": {"block": 32, "vocab_size": 300},
        "data": {"corpus": "none"},
        "train": {"sequence_length": 64, "sequences": 4, "micro_sequences": 4, "precision": "fp32"},
    }
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    settings = {
        "name": "t",
        "recipe": str(tmp_path / "base.yaml"),
        "directory": str(tmp_path / "out"),
        "architectures": {"sliding": {"model.mixer": "sliding"}, "bst": {"model.mixer": "bst"}},
        "baseline": "sliding",
        "sizes": [5e4, 1e5],
        "depths": [2, 4],
        "tokens_per_parameter": [0.1, 0.2],
        "seeds": [0, 1],
        "arms": {"all": {}},
        "shape": {"head_width": 4},
    }
    monkeypatch.setattr("bst_dist.study.runs.runner.POLL_S", 0.02)
    monkeypatch.setattr("bst_dist.study.runs.runner.LOOK_S", 0.02)
    config = parse(SweepConfig, settings)
    designer = Designer(config)
    runs, state = designer.runs(designer.cells()), State(config.root, config.retries)
    (tmp_path / "stand_in.py").write_text(STAND_IN % str(tmp_path / "told.json"))

    class StandIn(Runner):
        def _command(self, run, micro):
            command = super()._command(run, micro)
            return [sys.executable, str(tmp_path / "stand_in.py"), *command[command.index("bst_dist.train") + 1 :]]

    def go(told=None, only=None):
        (tmp_path / "told.json").write_text(json.dumps(told or {}))
        chosen = [run for run in runs if only is None or only in run.name]
        said = []
        StandIn(chosen, state, 2, said.append).run(lambda workers: None)
        return collect(chosen, state, "sliding"), said

    go.config, go.state, go.runs = config, state, runs
    return go


ONE = "n5e04-d2-s0"


def test_finished_sweep_starts_no_run_again(sweep):
    rows, said = sweep(only=ONE)
    assert {row.status for row in rows} == {"done"}
    assert len(said) == 6
    again, said = sweep(only=ONE)
    assert (again, said) == (rows, [])


def test_rows_count_the_steps_shared_with_the_trunk(sweep):
    rows, _ = sweep(only=f"sliding-all-{ONE}")
    runs = {run.name: run for run in sweep.runs}
    for row in rows:
        run = runs[row.run]
        assert row.time_s == run.recipe.train.steps  # one second per step, on the trunk or after it
        assert row.tokens == run.recipe.train.steps * 4 * 64
        assert row.flops == pytest.approx(run.flops)


def test_a_disturbed_trunk_counts_as_a_disturbed_machine(sweep):
    """The trunk is most of the time of a row, so its steps up to the branch are in `step_time_excess` too."""
    rows, _ = sweep(only=f"bst-all-{ONE}")
    assert [row.step_time_excess for row in rows] == [0.0, 0.0]
    steps = {run.multiple: run.recipe.branch.step for run in sweep.runs if run.name in {row.run for row in rows}}
    metrics = sweep.state.directory(rows[0].trunk) / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]

    def step_time_excess(slow):
        changed = [{**x, "step_time_s": 2.0 if x["kind"] == "train" and slow(x["step"]) else 1.0} for x in lines]
        metrics.write_text("".join(json.dumps(line) + "\n" for line in changed))
        return [
            row.step_time_excess
            for row in collect(sweep.runs, sweep.state, "sliding")
            if row.run in {r.run for r in rows}
        ]

    assert step_time_excess(lambda step: step > 0.9 * steps[0.1]) == [
        0.0,
        1.0,
    ]  # most steps of the longer branch's trunk
    assert step_time_excess(lambda step: step > 0.4 * steps[0.1]) == [1.0, 1.0]
    assert min(step_time_excess(lambda step: True)) > QUIET  # only beside the branch's own steps, of which two are warm


def test_rows_contain_the_hashes_of_the_corpora(sweep):
    rows, _ = sweep(only=f"sliding-all-{ONE}")
    assert [row.corpora for row in rows] == ["", ""]
    corpora = [{"path": "/a", "sha256": "1" * 64}, {"path": "/b", "sha256": "2" * 64}]
    start = {"versions": {"torch": "x"}, "corpora": corpora}
    (sweep.state.directory(rows[1].run) / "environment.json").write_text(json.dumps({"starts": [start]}))
    rows = [row for row in collect(sweep.runs, sweep.state, "sliding") if row.status == "done"]
    assert [row.corpora for row in rows] == ["", f"{'1' * 64} {'2' * 64}"]


def test_diverged_runs_are_recorded_with_their_branches_and_not_started_again(sweep):
    rows, _ = sweep({f"sliding-all-{ONE}-trunk": "diverge"}, only=f"sliding-all-{ONE}")
    assert [row.status for row in rows] == ["diverged"] * 2
    assert "its trunk: the loss is nan" in rows[0].reason
    assert sweep(only=f"sliding-all-{ONE}")[1] == []


def test_failed_runs_are_retried_up_to_the_limit_and_recorded(sweep):
    rows, said = sweep({f"sliding-all-{ONE}-m0.1": "fail", f"sliding-all-{ONE}-m0.2": "once"}, f"sliding-all-{ONE}")
    assert [row.status for row in rows] == ["failed", "done"]
    assert rows[0].reason == "Segmentation fault somewhere"
    assert sum("m0.1" in line for line in said) == 2


def test_failed_run_is_started_again_as_the_message_says(sweep, capsys):
    told = {f"sliding-all-{ONE}-m0.1": "fail", f"bst-all-{ONE}-trunk": "fail"}
    sweep(told, ONE)
    show_status(Study("sweep", "t", sweep.runs, sweep.state))
    said = " ".join(capsys.readouterr().out.split())
    assert "2 of the runs failed 2 times and will not be started again. To have one started again, delete its " in said
    sweep.state.path("attempts", next(r.name for r in sweep.runs if f"bst-all-{ONE}-trunk" in r.name)).unlink()
    assert sweep.state.remedy(sweep.runs).startswith("1 of the runs failed 2 times")
    (left,) = re.findall(r"failed starts: (\S+)", sweep.state.remedy(sweep.runs))
    Path(left).unlink()
    assert sweep.state.remedy(sweep.runs) == ""
    rows, _ = sweep(only=ONE)
    assert {row.status for row in rows} == {"done"}
    show_status(Study("sweep", "t", sweep.runs, sweep.state))
    assert "started again" not in capsys.readouterr().out


def test_run_stopped_by_a_signal_does_not_count_as_failed(sweep):
    """It is stopped three times, although only one failure is allowed."""
    rows, said = sweep({f"sliding-all-{ONE}-m0.1": "stop3"}, f"sliding-all-{ONE}")
    assert {row.status for row in rows} == {"done"}
    assert sum("waiting" in line for line in said) == 3


def test_unresponsive_processes_are_killed_after_one_common_wait(sweep, monkeypatch):
    clock, killed = [0.0], []

    class Deaf:
        def send_signal(self, number):
            pass

        def wait(self, timeout=None):
            if self not in killed:
                clock[0] += timeout
                raise subprocess.TimeoutExpired("train", timeout)

    monkeypatch.setattr("bst_dist.study.runs.runner.time.monotonic", lambda: clock[0])
    hear = {signal.SIGKILL: killed.append}
    monkeypatch.setattr("bst_dist.study.runs.runner.signal_session", lambda process, number: hear[number](process))
    runner = Runner(sweep.runs, sweep.state, 4, print)
    runner.workers = [Worker(sweep.runs[0], Deaf(), place) for place in range(4)]
    runner._end()
    assert len(killed) == 4
    assert clock[0] == SAVING_S


class Quiet:
    """A process that runs until it is told to end."""

    pid = returncode = None

    def poll(self) -> int | None:
        return self.returncode


def test_runs_of_others_are_looked_at_rarely_and_not_at_all_without_a_free_worker(sweep, monkeypatch):
    """All other runs are trained elsewhere; the clock is the test's."""
    clock, asked, process = [100.0], [], Quiet()
    monkeypatch.setattr("bst_dist.study.runs.runner.time.monotonic", lambda: clock[0])
    monkeypatch.setattr("bst_dist.study.runs.runner.LOOK_S", 30.0)
    first, *others = sweep.runs
    held = [sweep.state.lock(run.name) for run in others]
    look = sweep.state.status_of
    monkeypatch.setattr(sweep.state, "status_of", lambda run: asked.append(run.name) or look(run))

    def turns(runner: Runner, number: int, seconds: float) -> int:
        """Return the questions that turns within so many seconds ask."""
        asked.clear()
        for _ in range(number):
            clock[0] += seconds / number
            runner._collect()
            runner._fill()
        return len(asked)

    busy = Runner(sweep.runs, sweep.state, 1, lambda text: None)
    busy.workers = [Worker(first, process, 0)]
    assert turns(busy, 1000, 3600.0) == 0
    free = Runner(sweep.runs, sweep.state, 2, lambda text: None)
    free.workers = [Worker(first, process, 0)]
    assert turns(free, 1, 0.5) == len(others)
    assert turns(free, 20, 14.0) == 0
    assert len(others) <= turns(free, 2, 60.0) <= 2 * len(others)
    monkeypatch.setattr(free, "_start", lambda run: asked.append(f"start {run.name}"))
    process.returncode = 75  # stopped by a signal: to be started again, and at once
    turns(free, 1, 0.1)
    assert f"start {first.name}" in asked
    for descriptor in held:
        os.close(descriptor)


def test_workers_get_separate_accelerators(sweep, monkeypatch):
    run = next(run for run in sweep.runs if run.trunk is None)
    run = replace(run, recipe=run.recipe.model_copy(update={"ranks": 2}))
    runner = Runner([], sweep.state, 2, print)
    assert "CUDA_VISIBLE_DEVICES" not in runner._environment(run, 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert [runner._environment(run, place)["CUDA_VISIBLE_DEVICES"] for place in (0, 1)] == ["0,1", "2,3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,5,3,1")
    assert runner._environment(run, 1)["CUDA_VISIBLE_DEVICES"] == "3,1"
    with pytest.raises(UserError, match="3 workers of 2 ranks need 6 GPUs, here are 4"):
        Runner([], sweep.state, 3, print)._environment(run, 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    alone = replace(run, recipe=run.recipe.model_copy(update={"ranks": 1}))
    sharing = Runner([], sweep.state, 5, print, per_device=3)
    assert [sharing._environment(alone, place)["CUDA_VISIBLE_DEVICES"] for place in range(5)] == [
        "3",
        "3",
        "3",
        "1",
        "1",
    ]


def test_out_of_memory_halves_the_micro_batch_also_for_branches(sweep):
    rows, _ = sweep({f"bst-all-{ONE}": "oom"}, f"bst-all-{ONE}")
    assert [(row.status, row.micro_sequences) for row in rows] == [("done", 1)] * 2
    trunk = next(run for run in sweep.runs if run.name == rows[0].trunk)
    assert [attempt.micro_sequences for attempt in sweep.state.failed_starts(trunk.name)] == [4, 2]


def test_run_locked_by_another_process_is_skipped(sweep):
    run = sweep.runs[0]
    held = sweep.state.lock(run.name)
    assert sweep.state.status_of(run).status == "running"
    assert sweep.state.lock(run.name) is None
    os.close(held)
    assert sweep.state.status_of(run).status == "waiting"


def test_with_locks_of_one_host_alone_a_run_in_training_is_left_in_peace(sweep, monkeypatch):
    """Each of two commands gets the lock, as on two hosts. The first has not written the recipe yet."""
    monkeypatch.setattr("fcntl.flock", lambda *_: None)
    run = next(run for run in sweep.runs if run.trunk is None)
    directory, started = sweep.state.directory(run.name), []
    monkeypatch.setattr("subprocess.Popen", lambda *words, **options: started.append(words))
    lease = acquire(directory)
    (directory / "begun").touch()
    Runner([run], sweep.state, 1, print)._fill()
    assert (directory / "begun").exists()
    assert started == []
    refused = SimpleNamespace(poll=lambda: 2, returncode=2)
    second = Runner([run], sweep.state, 1, lambda text: None)
    second.workers = [Worker(run, refused, 0)]
    second._collect()  # a process that it started at the same time was refused
    assert sweep.state.failed_starts(run.name) == []
    lease.release()
    Runner([run], sweep.state, 1, print)._fill()
    assert len(started) == 1
    assert [path.name for path in directory.iterdir()] == ["lease"]


def test_table_reads_back_equal_and_wrong_columns_are_named(sweep, tmp_path):
    rows, _ = sweep(only=f"sliding-all-{ONE}")
    waiting = collect(sweep.runs, sweep.state, "sliding")
    waiting[0] = waiting[0].model_copy(update={"loss_by_block": (2.0, float("nan"))})  # no label in the last block
    path = tmp_path / "table.json"
    table.write(waiting, path)
    assert [row.model_dump_json() for row in table.read(path)] == [row.model_dump_json() for row in waiting]
    data = [json.loads(row.model_dump_json()) for row in rows]
    old = [{{"stratum": "block", "step_time_excess": "slowed"}.get(k, k): v for k, v in row.items()} for row in data]
    path.write_text(json.dumps(old))
    assert [row.model_dump_json() for row in table.read(path)] == [row.model_dump_json() for row in rows]
    data[1]["depth"] = "deep"
    path.write_text(json.dumps(data))
    with pytest.raises(table.TableError, match="row 1, column depth"):
        table.read(path)


def test_the_published_table_is_read():
    """Its columns have names of then: `block` for the stratum."""
    rows = table.read(Path(__file__).parents[3] / "docs/study/table.csv")
    first = rows[0]
    assert (len(rows), first.stratum, first.arm, first.seed) == (
        len((Path(__file__).parents[3] / "docs/study/table.csv").read_text().splitlines()) - 1,
        "all-n1.95e+05-d8-s0",
        "all",
        0,
    )
    assert {o.stratum for o in table.observations(rows)} == {row.stratum for row in rows}


def test_report_is_self_contained_and_names_every_run(sweep, tmp_path):
    rows, _ = sweep(only="-d2-")
    found = present.find(sweep.config, rows, draws=4)
    document.write(present.blocks(sweep.config, rows, found), tmp_path / "report", "t")
    page, text = ((tmp_path / "report" / name).read_text() for name in ("report.html", "report.md"))
    assert 'src="data:image/png;base64,' in page
    assert "http" not in page
    for row in rows:
        assert row.run in page
        assert row.run in text
    assert found.flops.variants["bst"].mean.value > 0
    first = next(line for line in text.splitlines() if line.startswith("- "))
    assert first.startswith("- bst is ahead of sliding by ")
    for line in text.splitlines():
        if line.startswith("!["):
            assert (tmp_path / "report" / line.rpartition("(")[2].rstrip(")")).exists()


@pytest.mark.ranks
@pytest.mark.long
def test_killed_and_restarted_sweep_gives_the_same_table(tmp_path):
    """Real training: once undisturbed, and once with the command killed repeatedly."""
    books = tmp_path / "text"
    books.mkdir()
    for number in range(8):
        (books / f"{number}.txt").write_text(
            "".join(f"line {number * k} of a small text, {k % 7}\n" for k in range(400))
        )
    prepared = {
        "source": {"kind": "folder", "path": str(books)},
        "output": str(tmp_path / "corpus"),
        "tokenizer": {"vocab_size": 300},
        "validation_fraction": 0.3,
    }
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(prepared))
    _bst("data", "prepare", tmp_path / "data.yaml").wait()

    def command(name):
        return [
            ROOT / "launch/sweeps/smoke.yaml",
            f"settings.data={{corpus: {tmp_path / 'corpus'}}}",
            "depths=[2]",
            "sizes=[40.0e+3, 60.0e+3]",
            "arms={near: {}}",
            f"directory={tmp_path / name}",
        ]

    whole = _bst("sweep", "run", *command("whole"), "--workers", "2")
    assert whole.wait() == 0
    for runs, pattern in ((1, "environment.json"), (4, "environment.json"), (8, "outcome.json")):
        process = _bst("sweep", "run", *command("cut"), "--workers", "2")
        while len(list((tmp_path / "cut" / "runs").glob(f"*/{pattern}"))) < runs:
            assert process.poll() is None, "the sweep has come to its end before it could be killed"
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert _bst("sweep", "run", *command("cut"), "--workers", "2").wait() == 0
    found, timed = [], ("time_s", "step_time_excess", "versions")
    for name in ("whole", "cut"):
        assert _bst("sweep", "collect", *command(name)).wait() == 0
        rows = json.loads((tmp_path / name / "table.json").read_text())
        found.append([{key: value for key, value in row.items() if key not in timed} for row in rows])
    assert len(found[0]) == 16
    assert found[0] == found[1]


def _bst(*words):
    bst = Path(sys.executable).with_name("bst")
    return subprocess.Popen([bst, *map(str, words)], cwd=ROOT, stdout=subprocess.DEVNULL)


class Ended:
    """A process that was killed."""

    returncode = -9


def test_reason_of_a_failure_is_read_only_from_the_output_of_its_own_start(sweep):
    """The log of a run has the output of all its starts, and the first one ran out of memory."""
    run = next(run for run in sweep.runs if run.trunk is None)
    runner, log = Runner([], sweep.state, 1, print), sweep.state.path("logs", run.name)
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("step 1\ntorch.OutOfMemoryError: CUDA out of memory.\n")
    first = runner._failed_start(Worker(run, Ended(), 0), 1.0)
    size = log.stat().st_size
    silent = runner._failed_start(Worker(run, Ended(), 0, size), 1.0)
    with log.open("a") as file:
        file.write("a node was lost\n")
    second = runner._failed_start(Worker(run, Ended(), 0, size), 1.0)
    assert "out of memory" in first.reason
    assert [(start.status, start.reason) for start in (silent, second)] == [
        ("failed", "exit status -9"),
        ("failed", "a node was lost"),
    ]


def test_runner_remembers_the_size_of_the_log_at_each_start(sweep, monkeypatch):
    run = next(run for run in sweep.runs if run.trunk is None)
    runner, log = Runner([run], sweep.state, 1, print), sweep.state.path("logs", run.name)
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("an earlier start\n")
    monkeypatch.setattr("bst_dist.study.runs.runner.subprocess.Popen", lambda *words, **options: Quiet())
    runner._start(run)
    assert [worker.log_bytes for worker in runner.workers] == [log.stat().st_size]
