"""Writers named in a recipe: they get all reports, and none of them can block or end a run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from bst_base.errors import UserError
from bst_base.json_lines import read_lines
from bst_dist.extras import EXTRAS
from bst_dist.report.metrics import (
    CorpusReport,
    EvalReport,
    MetricsFile,
    ProbeReport,
    SkippedReport,
    StepReport,
    Writer,
)
from bst_dist.report.services import Service, keep_name, kept_name
from bst_dist.report.writers import Background, find, require, scalars


def report(step: int) -> StepReport:
    return StepReport(
        step=step,
        tokens=100 * step,
        loss_nats=1.0 / step,
        bits_per_byte=float("nan"),
        gradient_norm=1.0,
        learning_rate=1e-3,
        ssm_learning_rate=1e-3,
        step_time_s=2.0,
        tokens_per_s=50.0,
        mfu=0.5,
    )


class Kept(Writer):
    """Writer that records the steps of its reports."""

    def __init__(self, fails_at: int | None = None, waits_for: threading.Event | None = None) -> None:
        self.steps: list[int] = []
        self.closed, self.fails_at, self.waits_for = False, fails_at, waits_for

    def write(self, report) -> None:
        if self.waits_for:
            self.waits_for.wait(60)
        if report.step == self.fails_at:
            raise SystemExit("no space left at\nthe service")
        self.steps.append(report.step)

    def write_probes(self, report) -> None:
        self.steps.append(-report.step)

    def close(self) -> None:
        self.closed = True


class Lines(Writer):
    """A custom writer that a recipe can name."""

    def __init__(self, run_dir, recipe, about) -> None:
        self._file = (run_dir / "lines.txt").open("a")
        print(recipe.name, sorted(about), file=self._file)

    def write(self, report) -> None:
        print(report.kind, report.step, file=self._file)

    def close(self) -> None:
        self._file.close()


class Broken(Writer):
    """A writer whose constructor fails."""

    def __init__(self, run_dir, recipe, about) -> None:
        raise ConnectionError("the service is away")


def test_reports_are_converted_to_scalars():
    found = scalars(report(4))
    assert found["train/loss_nats"] == 0.25
    assert "train/step" not in found
    assert "train/bits_per_byte" not in found  # nan
    assert scalars(SkippedReport(**vars(report(4)))) == {}
    evaluated = EvalReport(4, "validation", 9, 2.0, 3.0, [1.0, 2.0], 0.5)
    assert set(scalars(evaluated)) == {
        f"validation/{key}" for key in ("tokens", "loss_nats", "bits_per_byte", "time_s")
    }


def test_background_writer_passes_all_reports_in_order():
    kept = Kept()
    writer = Background("kept", lambda: kept)
    for step in (1, 2):
        writer.write(report(step))
    writer.write_probes(ProbeReport(2, {}, {}, None))
    writer.close()
    assert (kept.steps, kept.closed) == ([1, 2, -2], True)


def test_failed_writer_is_reported_once_and_disabled(capsys):
    kept = Kept(fails_at=2)
    writer = Background("kept", lambda: kept)
    for step in (1, 2, 3, 4):
        writer.write(report(step))
    writer.close()
    assert kept.steps == [1]
    assert capsys.readouterr().out == (
        "log.writers: kept failed and is off until the next start; metrics.jsonl has everything: no space left at the "
        "service\n"
    )


def test_hanging_writer_does_not_block_steps_or_the_end(capsys, monkeypatch):
    monkeypatch.setattr("bst_dist.report.writers.WAITING", 2)
    free = threading.Event()
    writer = Background("kept", lambda: Kept(waits_for=free), close_s=0.05)
    for step in range(1, 9):
        writer.write(report(step))
    writer.close()
    assert "kept did not write everything within 0 s; the run ends without the rest" in capsys.readouterr().out
    free.set()


def test_dropped_reports_are_counted(capsys, monkeypatch):
    monkeypatch.setattr("bst_dist.report.writers.WAITING", 2)
    free, begun, kept = threading.Event(), threading.Event(), Kept()
    writer = Background("kept", lambda: begun.set() or (free.wait(60) and kept))
    begun.wait(60)
    for step in range(1, 9):
        writer.write(report(step))
    free.set()
    writer.close()
    assert kept.steps == [1, 2]
    assert "kept was too slow: 6 reports were dropped" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("tensorbord", "no writer 'tensorbord': mlflow, wandb, or module:Class of your own"),
        ("nowhere:Writer", "nowhere:Writer: No module named 'nowhere' (is its folder in PYTHONPATH?)"),
        ("json:Writer", "json:Writer cannot be imported: module 'json' has no attribute 'Writer'"),
    ],
)
def test_a_writer_that_does_not_exist_is_refused(name, reason):
    with pytest.raises(UserError) as refused:
        require(name)
    assert str(refused.value) == f"log.writers: {reason}"


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_missing_package_of_a_writer_gives_one_message(name, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda module: object())
    require(name)
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
    with pytest.raises(
        UserError, match=rf"log.writers: {EXTRAS[name][0]} is not installed: pip install 'bst-dist\[{name}\]'"
    ):
        require(name)


def test_writer_registered_as_entry_point_is_found(monkeypatch):
    class Point:
        name, value = "lines", f"{__name__}:Lines"

    monkeypatch.setitem(sys.modules, __name__, sys.modules[__name__])
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [Point] if group == "bst_dist.writers" else [])
    assert find("lines") is Lines


def test_run_names_of_several_writers_are_stored_separately(tmp_path):
    assert kept_name(tmp_path, "wandb") is None
    keep_name(tmp_path, "wandb", "a")
    keep_name(tmp_path, "mlflow", "b")
    assert (kept_name(tmp_path, "wandb"), kept_name(tmp_path, "mlflow")) == ("a", "b")


class Taken(Service):
    """A service that appends each report to a file, one line per value."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__(run_dir, "taken")
        self.file = run_dir / "taken.txt"
        self.catch_up()

    def send(self, values: dict[str, float], step: int) -> None:
        with self.file.open("a") as file:
            file.write(f"{min(values)} {step} {values[min(values)]}\n")


EVALUATED = [EvalReport(2, split, 9, 2.0, 3.0, [1.0], 0.5) for split in ("validation", "books")]


def test_service_receives_each_report_only_once_after_a_resume(tmp_path):
    """After a resume from step 1, step 2 and its evaluation are repeated; other reports are new."""
    first, file = Taken(tmp_path), MetricsFile(tmp_path, 0)
    before = [report(1), report(2), EVALUATED[0]]
    for one in before:
        file.write(one)
        first.write(one)
    first.write_probes(ProbeReport(2, {"share": 0.25}, {}, None))
    first.close()
    file.close()
    MetricsFile(tmp_path, 1).close()
    second = Taken(tmp_path)
    for one in (replace(report(2), hfu=9.0), EVALUATED[0], EVALUATED[1], report(3)):
        second.write(one)
    for step in (2, 3):
        second.write_probes(ProbeReport(step, {"share": 0.5}, {}, None))
    second.write_probes(ProbeReport(4, {}, {}, None))
    second.write(report(3))  # sent twice in one start, because metrics.jsonl already had it when the writer was created
    assert second.file.read_text().splitlines() == [
        "train/data_wait_s 1 0.0",
        "train/data_wait_s 2 0.0",
        "validation/bits_per_byte 2 3.0",
        "share 2 0.25",
        "books/bits_per_byte 2 3.0",
        "train/data_wait_s 3 0.0",
        "share 3 0.5",
    ]


def test_writer_added_later_receives_past_reports(tmp_path):
    file = MetricsFile(tmp_path, 0)
    reports = [report(1), SkippedReport(**vars(report(2))), *EVALUATED, CORPUS.of_average(), CORPUS]
    for one in reports:
        file.write(one)
    Taken(tmp_path)
    names = [line.split(" 2 ")[0] for line in (tmp_path / "taken.txt").read_text().splitlines()]
    assert names == [
        "train/data_wait_s 1 0.0",
        "validation/bits_per_byte",
        "books/bits_per_byte",
        "validation numbers averaged/bits_per_byte",
        "validation numbers/bits_per_byte",
    ]


CORPUS = CorpusReport(2, "numbers", 9, 2.0, 3.0, [1.0], 0.5, 0.1)


def test_reports_of_older_versions_without_lists_are_not_sent_again(tmp_path):
    file = MetricsFile(tmp_path, 0)
    for step in (1, 2, 3):
        file.write(report(step))
    MetricsFile(tmp_path, 2).close()
    keep_name(tmp_path, "taken", "as it is called there")
    for _ in range(2):
        service = Taken(tmp_path)
        for step in (3, 4):
            service.write(report(step))
        service.close()
    assert service.file.read_text() == "train/data_wait_s 4 0.0\n"


def test_incomplete_last_line_of_a_list_is_ignored(tmp_path):
    first = Taken(tmp_path)
    for step in (1, 2):
        first.write(report(step))
    first.close()
    path = tmp_path / "writers.taken.jsonl"
    path.write_text(path.read_text()[:-4])
    for _ in range(2):
        again = Taken(tmp_path)
        again.write(report(2))
        again.close()
    assert [line.split()[1] for line in again.file.read_text().splitlines()] == ["1", "2", "2"]


KILLED = """
import os, signal, sys, threading
from pathlib import Path
from bst_dist.report.metrics import MetricsFile
from bst_dist.report.writers import Background
from test_writers import Taken, report

run_dir, after = Path(sys.argv[1]), int(sys.argv[2])
taken = threading.Event()

class Slow(Taken):
    def send(self, values, step):
        if step > after:
            taken.set()
            threading.Event().wait()
        super().send(values, step)

file, writer = MetricsFile(run_dir, 0), Background("slow", lambda: Slow(run_dir))
for step in range(1, 9):
    file.write(report(step))
    writer.write(report(step))
taken.wait()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_reports_not_sent_before_a_kill_are_sent_after_restart(tmp_path):
    """Killed after 8 steps, of which the service has received 3; resumed from step 6."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), "3"], env=environment, timeout=300)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "taken.txt").read_text().count("train") == 3
    MetricsFile(tmp_path, 6).close()
    service = Taken(tmp_path)
    for step in (7, 8, 9):
        service.write(report(step))
    assert [int(line.split()[1]) for line in service.file.read_text().splitlines()] == list(range(1, 10))


def wandb_records(path: Path) -> list:
    """Return the records of an offline W&B run's file.

    It has a header of 7 bytes, then a log in LevelDB's format: blocks of 32 KiB with records of 4 bytes checksum, 2
    bytes length, 1 byte type (1: whole record; 2, 3, 4: first, middle, last part).
    """
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, part, found = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            found.append(Record.FromString(part))
            part = b""
    return found


def values_of(name, history):
    """Return the (step, value) pairs of one curve in W&B's history records, in order."""
    lines = [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in one.item} for one in history
    ]
    return [(line["step"], line[name]) for line in lines if name in line]


@pytest.mark.ranks
def test_resumed_run_continues_the_same_run_in_each_service(recipe_file, tmp_path):
    """Runs the whole program, resumed so that two steps are repeated, with an evaluation that was not sent.

    W&B is offline, MLflow uses a local store, and one writer always fails.
    """
    for module in ("wandb", "mlflow", "sqlalchemy"):
        pytest.importorskip(module)
    names = ["wandb", "mlflow", "test_writers:Lines", "test_writers:Broken"]
    recipe = recipe_file(log={"writers": names}, checkpoint={"keep_last": 9})
    run_dir, store = tmp_path / "run", f"sqlite:///{tmp_path / 'ml.db'}"
    environment = os.environ | {
        "WANDB_MODE": "offline",
        "MLFLOW_TRACKING_URI": store,
        "PYTHONPATH": str(Path(__file__).parent),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }
    program = [sys.executable, "-m", "bst_dist.train", str(recipe), "--run-dir", str(run_dir)]
    for more in (["--until", "5"], ["--resume"]):
        if run_dir.exists():  # as if the first start had been killed before it sent this report
            with (run_dir / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"kind": "eval", **vars(EVALUATED[1])}) + "\n")
        for step in (4, 5):
            shutil.rmtree(run_dir / "checkpoints" / f"step-{step:08d}", ignore_errors=True)
        done = subprocess.run([*program, *more], env=environment, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("test_writers:Broken failed") == 1
        assert "the service is away" in done.stdout
        assert "log.writers: wandb" not in done.stdout
        assert "log.writers: mlflow" not in done.stdout
    losses = {
        line["step"]: line["loss_nats"] for line in read_lines(run_dir / "metrics.jsonl") if line["kind"] == "train"
    }
    assert list(losses) == [1, 2, 3, 4, 5, 6]

    lines = (run_dir / "lines.txt").read_text().splitlines()
    assert lines.count("small ['parameters', 'ranks']") == 2
    taken = [int(line.split()[1]) for line in lines if line.startswith("train")]
    assert taken[:5] == [1, 2, 3, 4, 5]
    assert taken[5] <= 4  # a plain writer gets repeated steps again
    assert taken[5:] == list(range(taken[5], 7))

    files = sorted((run_dir / "wandb").glob("offline-run-*/*.wandb"))
    records = [wandb_records(path) for path in files]
    assert len(files) == 2
    assert {record.run.run_id for of in records for record in of if record.WhichOneof("record_type") == "run"} == {
        kept_name(run_dir, "wandb")
    }
    history = [record.history for of in records for record in of]
    assert values_of("train/loss_nats", history) == list(losses.items())  # each step once
    assert values_of("books/loss_nats", history) == [(2, 2.0)]

    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=store)
    (run,) = client.search_runs([client.get_experiment_by_name("bst").experiment_id])
    assert (run.info.run_id, run.info.status) == (kept_name(run_dir, "mlflow"), "FINISHED")
    assert run.data.params["model.width"] == "16"
    history = client.get_metric_history(run.info.run_id, "train/loss_nats")
    assert sorted((one.step, one.value) for one in history) == list(losses.items())
    missed = client.get_metric_history(run.info.run_id, "books/loss_nats")
    assert [(one.step, one.value) for one in missed] == [(2, 2.0)]
    assert run.data.metrics["validation/loss_nats"] == pytest.approx(
        [line["loss_nats"] for line in read_lines(run_dir / "metrics.jsonl") if line["kind"] == "eval"][-1]
    )
