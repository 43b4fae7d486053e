"""The lines that a run prints."""

from __future__ import annotations

from dataclasses import replace
from math import nan

import pytest

from bst_dist.report.console import Console, duration
from bst_dist.report.metrics import EvalReport, PerformanceReport
from bst_dist.train.config import TrainConfig
from tests.report.test_metrics import report


def console(every: int, steps: int, **options) -> Console:
    """Return the console of a run with 100 tokens in each step."""
    return Console(every, steps, lambda step: 100 * (steps - step), **options)


def test_console_prints_the_first_every_nth_and_last_step(capsys):
    out = console(every=4, steps=10)
    for step in range(1, 11):
        out.write(report(step, seconds=30.0 if step == 1 else 2.0))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("/")[0].strip() for line in lines] == ["1", "4", "8", "10"]
    assert [line.split()[-1] for line in lines[1:]] == ["12s", "4s", "0s"]
    assert "50.0%" in lines[1]


def test_utilisation_is_not_shown_without_a_known_peak(capsys):
    out = console(every=2, steps=2)
    for step in (1, 2):
        out.write(replace(report(step), mfu=nan))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-2] for line in lines] == ["-", "-"]
    assert len(lines[0]) == len(Console.header())
    out = console(every=2, steps=2, utilisation=False)  # as on a CPU, which never has one
    out.write(replace(report(1), mfu=nan))
    (line,) = capsys.readouterr().out.splitlines()
    assert len(line) == len(Console.header(utilisation=False)) == len(lines[0]) - len("    MFU")
    assert "MFU" not in Console.header(utilisation=False)


@pytest.mark.parametrize(
    ("seconds", "said"), [(0, "0s"), (59.6, "1m 00s"), (185, "3m 05s"), (7620, "2h 07m"), (273600, "3d 04h")]
)
def test_durations_are_printed_in_readable_units(seconds, said):
    assert duration(seconds) == said


def test_the_time_left_follows_the_batch_and_counts_what_comes_between_steps(capsys):
    train = TrainConfig(
        steps=100,
        sequence_length=10,
        sequences=2,
        sequence_changes=[{"step": 50, "sequences": 8}],
        length_changes=[{"step": 80, "sequence_length": 20}],
    )
    assert (
        train.tokens_after(10)
        == 40 * 20 + 30 * 80 + 20 * 160
        == sum((2 if step < 50 else 8) * (10 if step < 80 else 20) for step in range(10, 100))
    )
    out = Console(5, 100, train.tokens_after)
    for step in range(1, 6):
        out.write(report(step, seconds=2.0))
    seconds = {"forward": 1.5, "backward": 0.5, "evaluate": 0.3, "checkpoint": 0.1}
    out.write(PerformanceReport(5, seconds, {}, 0, 0, 0.5, 0, "node-7", 1.0))
    for step in range(6, 11):
        out.write(report(step, seconds=2.0))
    _, plain, with_pauses = (line.split("  ")[-1].strip() for line in capsys.readouterr().out.splitlines())
    assert plain == duration(2.0 * train.tokens_after(5) / 20)
    assert with_pauses == duration(2.0 * 1.2 * train.tokens_after(10) / 20)


def test_console_says_which_weights_were_evaluated(capsys):
    out, evaluated = console(10, 100), EvalReport(2, "validation", 9, 2.0, 3.0, [1.0], 0.5)
    out.write(evaluated)
    out.write(evaluated.of_average())
    weights, average = capsys.readouterr().out.splitlines()
    assert weights.endswith("  validation, 9 tokens in 0.5 s")
    assert average.endswith("  averaged weights: validation, 9 tokens in 0.5 s")


def test_console_warns_if_a_rank_is_slow_twice_in_a_row(capsys):
    out = console(every=5, steps=100, straggler=1.5)
    for step, rank, ratio in ((5, 1, 2.0), (10, 2, 2.0), (15, 2, 1.8), (20, 2, 1.2)):
        out.write(
            PerformanceReport(
                step, {"forward": 3.0, "data": 1.0}, {"all-reduce": 2e6}, 2**30, 0, 0.5, rank, "node-7", ratio
            )
        )
    first, second = capsys.readouterr().out.splitlines()
    assert first.strip() == "forward 75%, data 25%; 2.0 MB sent per step; 1.00 GiB of memory"
    assert "rank 2 on node-7 is slow" in second
    assert "1.80 times" in second
