from __future__ import annotations

import errno
import json
from types import SimpleNamespace

import pytest

from bst_base.json_lines import read_lines
from bst_dist.faults.signals import Notice
from bst_dist.faults.status import UNREADABLE
from bst_dist.report.metrics import FILE, CorpusReport, EvalReport, MetricsFile, ProbeReport, StepReport, bits_per_byte
from bst_dist.report.tensorboard import TensorBoard
from bst_dist.train.__main__ import _reported


def report(step: int, seconds: float = 2.0) -> StepReport:
    return StepReport(
        step=step,
        tokens=100 * step,
        loss_nats=1.0,
        bits_per_byte=0.5,
        gradient_norm=1.0,
        learning_rate=1e-3,
        ssm_learning_rate=1e-3,
        step_time_s=seconds,
        tokens_per_s=100 / seconds,
        mfu=0.5,
    )


def test_resume_drops_lines_after_the_checkpoint_and_incomplete_lines(tmp_path):
    first = MetricsFile(tmp_path, 0)
    for step in (1, 2, 3):
        first.write(report(step))
    first.close()
    with (tmp_path / FILE).open("a") as file:
        file.write('{"kind": "train", "st')
    second = MetricsFile(tmp_path, 2)
    second.write(report(3, seconds=4.0))
    second.close()
    lines = read_lines(tmp_path / FILE)
    assert [(line["kind"], line["step"], line["step_time_s"]) for line in lines] == [
        ("train", 1, 2.0),
        ("train", 2, 2.0),
        ("train", 3, 4.0),
    ]
    assert all(json.loads(line) for line in (tmp_path / FILE).read_text().splitlines())


def test_bits_per_byte():
    assert bits_per_byte(0.6931471805599453 * 8, 4) == pytest.approx(2.0)
    assert bits_per_byte(1.0, 0) != bits_per_byte(1.0, 0)  # nothing to divide by


def test_lines_of_evaluations_begin_with_their_kind(tmp_path):
    """The lines of older versions, character by character."""
    file = MetricsFile(tmp_path, 0)
    for one in (
        EvalReport(2, "validation", 9, 2.0, 3.0, [1.0], 0.5),
        CorpusReport(2, "books", 9, 2.0, 3.0, [1.0], 0.5, 0.1),
    ):
        file.write(one)
        file.write(one.of_average())
    shared = '"tokens": 9, "loss_nats": 2.0, "bits_per_byte": 3.0, "loss_by_block": [1.0], "time_s": 0.5'
    assert (tmp_path / FILE).read_text().splitlines() == [
        f'{{"kind": "eval", "step": 2, "split": "validation", {shared}}}',
        f'{{"kind": "averaged", "step": 2, "split": "validation", {shared}}}',
        f'{{"kind": "corpus", "step": 2, "split": "books", {shared}, "loss_nats_standard_error": 0.1}}',
        f'{{"kind": "averaged", "step": 2, "split": "books", {shared}, "loss_nats_standard_error": 0.1}}',
    ]


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("writer", ["metrics", "tensorboard", "probes"])
def test_a_file_system_that_fails_under_an_open_file_is_an_error_of_storage(tmp_path, capsys, number, writer):
    """Status 74, so that a restart is tried; the system gives no file name for a write to an open file."""

    def fail(*_):
        raise OSError(number, "the disk is gone")

    if writer == "metrics":
        failing = MetricsFile(tmp_path, 0)
        failing.close()
        failing._file = SimpleNamespace(write=fail)
    else:
        failing = TensorBoard(tmp_path, 0, {})
        failing._writer.add_scalar = fail
    with pytest.raises(OSError, match="the disk is gone") as raised:
        if writer == "probes":
            failing.write_probes(ProbeReport(1, {"a": 1.0}, {}, None))
        else:
            failing.write(report(1))
    assert _reported(raised.value, Notice()) == UNREADABLE
    assert str(failing.path) in capsys.readouterr().err
