from __future__ import annotations

import json
from dataclasses import replace
from math import nan

import pytest

from bst_dist.report.metrics import (
    FILE,
    Console,
    CorpusReport,
    EvalReport,
    MetricsFile,
    StepReport,
    bits_per_byte,
    duration,
    read_lines,
)


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


def test_console_prints_the_first_every_nth_and_last_step(capsys):
    console = Console(every=4, steps=10)
    for step in range(1, 11):
        console.write(report(step, seconds=30.0 if step == 1 else 2.0))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("/")[0].strip() for line in lines] == ["1", "4", "8", "10"]
    assert [line.split()[-1] for line in lines[1:]] == ["12s", "4s", "0s"]
    assert "50.0%" in lines[1]


def test_utilisation_is_not_shown_without_a_known_peak(capsys):
    console = Console(every=2, steps=2)
    for step in (1, 2):
        console.write(replace(report(step), mfu=nan))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-2] for line in lines] == ["-", "-"]
    assert len(lines[0]) == len(Console.header())
    console = Console(every=2, steps=2, utilisation=False)  # as on a CPU, which never has one
    console.write(replace(report(1), mfu=nan))
    (line,) = capsys.readouterr().out.splitlines()
    assert len(line) == len(Console.header(utilisation=False)) == len(lines[0]) - len("    MFU")
    assert "MFU" not in Console.header(utilisation=False)


@pytest.mark.parametrize(
    ("seconds", "said"), [(0, "0s"), (59.6, "1m 00s"), (185, "3m 05s"), (7620, "2h 07m"), (273600, "3d 04h")]
)
def test_durations_are_printed_in_readable_units(seconds, said):
    assert duration(seconds) == said


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


def test_console_says_which_weights_were_evaluated(capsys):
    console, evaluated = Console(10, 100), EvalReport(2, "validation", 9, 2.0, 3.0, [1.0], 0.5)
    console.write(evaluated)
    console.write(evaluated.of_average())
    weights, average = capsys.readouterr().out.splitlines()
    assert weights.endswith("  validation, 9 tokens in 0.5 s")
    assert average.endswith("  averaged weights: validation, 9 tokens in 0.5 s")
