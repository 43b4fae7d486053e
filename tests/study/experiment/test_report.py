"""The table of an experiment, compared with the values written to its run directories."""

from __future__ import annotations

import argparse
import csv
import json
import math
import os

import pytest
import yaml

from bst_base.outputs import left_for_afterwards
from bst_base.settings import dump
from bst_dist.study.experiment.commands.report import report
from bst_dist.study.experiment.config import load_experiment
from bst_dist.study.experiment.design import trials
from bst_dist.study.experiment.measure import progress, reached
from bst_dist.study.runs.results import Result
from bst_dist.study.runs.state import State
from bst_dist.train.config import TrainConfig


@pytest.fixture
def made(tmp_path):
    """An experiment with two arms whose run directories the test writes."""
    base = {
        "model": {"width": 16, "heads": 2, "ffn": 32, "block": 8, "depth": 2, "mixer": "bst", "vocab_size": 300},
        "data": {"corpus": "none"},
        "train": {"steps": 4, "sequence_length": 16, "sequences": 2},
        "evaluation": {"every": 1},
        "log": {"every": 2},
    }
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    data = {
        "name": "t",
        "question": "Does it?",
        "recipe": "base.yaml",
        "reference": "sliding",
        "seeds": [0, 1],
        "arms": {"sliding": {"model.mixer": "sliding"}, "fir": {"model.ssm": {"kernel": "explicit", "length": 16}}},
        "directory": str(tmp_path / "out"),
        "measure": {"speed": True, "time_to": 3.0},
    }

    class Made:
        def __init__(self, **changes):
            path = tmp_path / "experiment.yaml"
            path.write_text(yaml.safe_dump({**data, **changes}, sort_keys=False))
            self.experiment = load_experiment(path, [])
            self.trials = trials(self.experiment)
            self.state = State(self.experiment.directory, 1)
            self.commit = "abc"
            self.corpora = []

        def finish(self, trial, losses, step_times=(9.0, 4.0, 0.25, 1.0), outcome=None):
            """Write a finished run with these evaluations, one per step."""
            run = self.state.directory(trial.name)
            run.mkdir(parents=True)
            (run / "recipe.yaml").write_text(dump(trial.recipe))
            lines = []
            for step, (loss, seconds) in enumerate(zip(losses, step_times, strict=True), 1):
                lines += [
                    {
                        "kind": "train",
                        "step": step,
                        "tokens": 32 * step,
                        "step_time_s": seconds,
                        "tokens_per_s": 32 / seconds,
                        "bits_per_byte": loss + 1,
                    },
                    {"kind": "eval", "step": step, "loss_nats": 2 * loss, "bits_per_byte": loss},
                    {"kind": "performance", "step": step, "memory_bytes": step * 2**20},
                ]
            (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            (run / "outcome.json").write_text(json.dumps(outcome or {"finished": True}))
            corpora = [{"path": "corpus", "sha256": sha256} for sha256 in self.corpora]
            starts = [{"versions": {"torch": "2.13.0", "commit": self.commit}, "corpora": corpora}]
            (run / "environment.json").write_text(json.dumps({"starts": starts}))

        def evaluated(self, trial, bits, sizes, lengths=(16, 32)):
            """Write the stored result of its evaluation by length and document."""
            ask = f"at-{'-'.join(map(str, lengths))}-of-all"
            kept = self.experiment.directory / "lengths" / f"{trial.name}-{ask}.json"
            kept.parent.mkdir(parents=True, exist_ok=True)
            beyond = "fir" if trial.arm == "fir" else "carried"
            results = [
                {"length": n, "how": beyond if n > 16 else "carried", "bits": b, "bytes": sizes}
                for n, b in zip(lengths, bits, strict=True)
            ]
            kept.write_text(json.dumps(results))

        def report(self):
            args = argparse.Namespace()
            found = report(args, self.experiment, self.trials, self.state)
            for write in left_for_afterwards(args):
                write()
            return found

    return Made


def _rows(table):
    return {row["arm"]: row for row in table["rows"]}


def test_table_contains_the_results_of_the_runs(made, capsys):
    m = made()
    for trial in m.trials:
        fir = trial.arm == "fir"
        times = (9, 8, 0.5, 2) if fir else (9, 4, 0.25, 1)
        m.finish(trial, [6.0, 4.0, 2.5, 2.0 + fir * (0.1 + 0.01 * trial.seed)], times)
    table = m.report()
    rows = _rows(table)
    loss = rows["sliding"]["measured"]["bits_per_byte"]
    assert (loss["value"], loss["standard_error"], loss["over"], loss["n"]) == (2.0, 0.0, "seeds", 2)
    loss = rows["fir"]["measured"]["bits_per_byte"]
    assert loss["by_seed"] == {"0": pytest.approx(2.1), "1": pytest.approx(2.11)}
    gap = rows["fir"]["difference"]["bits_per_byte"]
    assert gap["value"] == pytest.approx(0.105)
    assert gap["standard_error"] == pytest.approx(0.005)
    assert gap["interval_95"] == pytest.approx(12.7062 * 0.005, rel=1e-4)  # Student's t with one degree of freedom
    assert gap["apart"]
    assert "difference" not in rows["sliding"] or not rows["sliding"]["difference"]
    assert rows["sliding"]["measured"]["tokens_per_s"]["value"] == 80  # median of 128 and 32: two steps are warm-up
    assert rows["sliding"]["measured"]["memory_mib"]["value"] == 4
    # 3.0 lies between 4.0 after step 2 and 2.5 after step 3, two thirds of the way; the median step takes 0.625 s.
    assert rows["sliding"]["measured"]["tokens_to_loss"]["value"] == pytest.approx(32 * (2 + 2 / 3))
    assert rows["sliding"]["measured"]["seconds_to_loss"]["value"] == pytest.approx(0.625 * (2 + 2 / 3))
    shown = capsys.readouterr().out
    assert "+0.1050 ± 0.0050 *" in shown
    assert "-50% ± 0%" in shown  # tokens/s, as a share of the reference's
    assert "differences are paired by seed" in shown


def test_percentages_are_of_the_reference_with_the_same_seeds(made, capsys):
    """The seed that only the arm or only the reference has says nothing about the difference."""
    m = made(seeds=[0, 1, 2, 3])
    slow = {
        ("sliding", 0): 4.0,
        ("fir", 0): 2.0,
        ("sliding", 1): 4.0,
        ("fir", 1): 2.0,
        ("fir", 2): 0.1,
        ("sliding", 3): 0.1,
    }
    for trial in m.trials:
        if (seconds := slow.get((trial.arm, trial.seed))) is not None:
            m.finish(trial, [6.0, 4.0, 2.5, 2.0], (9, seconds, seconds, seconds))
    row = _rows(m.report())["fir"]
    assert row["difference"]["tokens_per_s"]["value"] == 16 - 8  # of seeds 0 and 1
    assert "+100% ± 0% *" in capsys.readouterr().out  # of 8 tokens/s


def test_written_files_contain_the_same_table(made):
    m = made()
    for trial in m.trials:
        m.finish(trial, [6.0, 4.0, 2.5, 2.0 + trial.seed])
    table, out = m.report(), m.experiment.results
    assert json.loads((out / "table.json").read_text()) == table
    with (out / "table.csv").open() as file:
        cells = {(row["arm"], row["column"]): row for row in csv.DictReader(file)}
    assert float(cells["fir", "bits_per_byte"]["value"]) == 2.5
    assert float(cells["fir", "bits_per_byte"]["difference"]) == 0
    assert "| sliding | 2 of 2 |" in (out / "report.md").read_text()
    assert "Trained with torch 2.13.0, commit abc." in (out / "report.md").read_text()
    assert (out / "figures" / "t.png").stat().st_size > 1000


def test_runs_of_several_code_versions_are_counted_with_a_warning(made):
    m = made()
    for trial in m.trials:
        m.commit = "def" if trial.arm == "fir" else "abc"
        m.finish(trial, [6.0, 4.0, 2.5, 2.0])
    said = m.report()["trained_with"]
    assert "commit abc (2 runs) and def (2 runs)" in said
    assert "Not all runs were trained with the same commit" in said


def test_differences_with_one_seed_are_paired_by_document(made):
    m = made(seeds=[3], measure={"lengths": [16, 32], "validation": False})
    sliding, fir = m.trials
    for trial in m.trials:
        m.finish(trial, [6.0, 4.0, 2.5, 2.0])
    m.evaluated(sliding, [[8.0, 30.0, 21.0], [8.0, 30.0, 20.0]], [4, 10, 6])
    m.evaluated(fir, [[8.0, 30.0, 22.0], [9.0, 32.0, 21.0]], [4, 10, 6])
    table = m.report()
    gap = _rows(table)["fir"]["difference"]["bits_per_byte_at_32"]
    residuals = [d - 4 / 20 * size for d, size in zip([1.0, 2.0, 1.0], [4, 10, 6], strict=True)]
    assert gap["value"] == pytest.approx(4 / 20)
    assert gap["standard_error"] == pytest.approx(math.sqrt(3 / 2 * sum(r * r for r in residuals)) / 20)
    assert (gap["over"], gap["n"]) == ("documents", 3)
    assert "one seed" in table["standard_errors"]
    assert "FIR of the trained length, 16 tokens" in " ".join(table["notes"])


def test_unsupported_length_is_noted_and_other_lengths_are_measured(made):
    m = made(
        seeds=[3],
        arms={"sliding": {"model.mixer": "sliding"}, "full": {"model.mixer": "full", "model.full": {"longest": 16}}},
        measure={"lengths": [16, 32]},
    )
    for trial in m.trials:
        m.finish(trial, [6.0, 4.0, 2.5, 2.0])
    m.evaluated(m.trials[0], [[8.0, 30.0], [8.0, 30.0]], [4, 10])
    m.evaluated(m.trials[1], [[8.0, 30.0]], [4, 10], lengths=(16,))
    row = _rows(m.report())["full"]
    assert "bits_per_byte_at_16" in row["measured"]
    assert "bits_per_byte_at_32" not in row["measured"]
    assert "refused: length 32" in row["notes"]["bits_per_byte_at_32"]


def test_diverged_and_waiting_runs_are_in_the_table(made, capsys):
    m = made()
    (first, second, third, _) = m.trials
    m.finish(first, [6.0, 4.0, 2.5, 2.0])
    m.finish(second, [6.0, 4.0, 2.5, 2.1])
    m.finish(third, [9.0] * 4, outcome={"finished": False, "diverged": "the loss is nan in step 3"})
    table = m.report()
    assert table["runs"] == {"done": 2, "diverged": 1, "waiting": 1}
    assert _rows(table)["sliding"]["seeds"] == {"0": "done", "1": "diverged"}
    assert _rows(table)["fir"]["difference"]["bits_per_byte"]["n"] == 1
    shown = capsys.readouterr().out
    assert "sliding: diverged the loss is nan in step 3 (seed 1)" in shown
    assert "1 of 2" in shown


def test_runs_trained_on_other_text_are_not_compared(made, capsys):
    """Seeds 0 and 1 of fir read another text; the text of seed 3 is unknown, as in older results."""
    m = made(seeds=[0, 1, 2, 3])
    for trial in m.trials:
        other = trial.arm == "fir" and trial.seed < 2
        m.corpora = [] if trial.seed == 3 else ["b" * 64 if other else "a" * 64, "c" * 64]
        m.finish(trial, [6.0, 4.0, 2.5, 2.0 + (trial.arm == "fir") * (1.0 if other else 0.1 + 0.01 * trial.seed)])
    row = _rows(m.report())["fir"]
    gap = row["difference"]["bits_per_byte"]
    assert (gap["n"], gap["value"]) == (2, pytest.approx(0.125))
    assert row["notes"]["bits_per_byte"] == "2 of 4 seeds: trained on other text than sliding: not compared"
    assert row["measured"]["bits_per_byte"]["n"] == 4
    assert "† fir, 2 of 4 seeds: trained on other text than sliding" in " ".join(capsys.readouterr().out.split())


def test_arm_trained_on_other_text_has_no_difference(made):
    m = made()
    for trial in m.trials:
        m.corpora = ["b" * 64 if trial.arm == "fir" else "a" * 64]
        m.finish(trial, [6.0, 4.0, 2.5, 2.0 + (trial.arm == "fir")])
    assert _rows(m.report())["fir"]["difference"] == {}


@pytest.mark.parametrize("late", ["fir", "sliding"])
def test_target_that_a_seed_does_not_reach_is_not_compared(made, late):
    """The seeds that reach it are the better ones: their mean would favour the arm that reaches it less often."""
    m = made(seeds=[0, 1, 2], measure={"time_to": 2.2})
    for trial in m.trials:
        missed = trial.arm == late and trial.seed == 2
        m.finish(trial, [6.0, 4.0, 2.5 - 0.2 * (trial.arm == "fir") - 0.01 * trial.seed, 2.3 if missed else 2.0])
    row = _rows(m.report())["fir"]
    assert set(row["difference"]) == {"bits_per_byte"}
    assert "not compared with sliding: a run of the two has no value" in row["notes"]["tokens_to_loss"]
    assert ("1 of 3 seeds: not reached" in row["notes"]["tokens_to_loss"]) == (late == "fir")


def test_evaluation_is_repeated_for_a_run_trained_anew_on_other_text(made):
    m = made(seeds=[3])
    name = m.trials[0].name
    m.finish(m.trials[0], [6.0, 4.0, 2.5, 2.0])
    asked = []

    def evaluated(corpora):
        return m.state.cached("lengths", name, "at-16", corpora, lambda: asked.append(corpora) or len(asked))

    assert [evaluated("a"), evaluated("a"), evaluated("b"), evaluated("a")] == [1, 1, 2, 1]
    assert asked == ["a", "b"]


def test_older_evaluation_without_the_text_is_kept_unless_the_run_ended_later(made):
    m = made(seeds=[3])
    name = m.trials[0].name
    m.finish(m.trials[0], [6.0, 4.0, 2.5, 2.0])
    older = m.state.path("lengths", f"{name}-at-16")
    older.parent.mkdir(parents=True)
    older.write_text("7")
    assert m.state.cached("lengths", name, "at-16", "a", lambda: 8) == 7
    ended = (m.state.directory(name) / "outcome.json").stat().st_mtime_ns
    os.utime(older, ns=(ended - 1, ended - 1))
    assert m.state.cached("lengths", name, "at-16", "a", lambda: 8) == 8
    assert m.state.cached("lengths", name, "at-16", "a", lambda: 9) == 8


def test_unreached_target_loss_is_noted(made):
    m = made(measure={"time_to": 1.0})
    for trial in m.trials:
        m.finish(trial, [6.0, 4.0, 2.5, 0.5 if trial.seed else 2.0])
    row = _rows(m.report())["sliding"]
    assert row["measured"]["tokens_to_loss"]["n"] == 1
    assert row["notes"]["tokens_to_loss"] == "1 of 2 seeds: not reached: at best 2.000"


def test_table_without_trained_runs_is_empty(made):
    table = made().report()
    assert table["runs"] == {"waiting": 4}
    assert all(not row["measured"] for row in table["rows"])


@pytest.mark.parametrize(("target", "step"), [(7.0, 10.0), (5.0, 15.0), (4.0, 20.0), (3.5, 38.0), (3.0, None)])
def test_step_that_reaches_a_loss_is_interpolated_between_evaluations(target, step):
    assert reached(target, [(10, 6.0), (20, 4.0), (30, 4.5), (40, 3.25)]) == (step and pytest.approx(step))


def test_progress_follows_changes_of_the_batch(tmp_path):
    """100 steps of 8 sequences in 0.1 s, then 100 of 32 in 0.4 s; the first two steps of the start compile."""
    train = TrainConfig(steps=200, sequence_length=512, sequences=8, sequence_changes=[{"step": 100, "sequences": 32}])
    lines, tokens = [], 0
    for step in range(200):
        sequences, seconds = (8, 0.1) if step < 100 else (32, 0.4)
        tokens += sequences * 512
        lines.append(
            {"kind": "train", "step": step + 1, "tokens": tokens, "step_time_s": 60.0 if step < 2 else seconds}
        )
    steps, read, spent = progress(Result(tmp_path, lines), train)
    assert (steps[0], read[0], spent[0]) == (0, 0, 0.0)
    assert (steps[100], read[100], spent[100]) == (100, 409_600, pytest.approx(10.0))
    assert (steps[150], read[150], spent[150]) == (150, 409_600 + 50 * 32 * 512, pytest.approx(30.0))


def test_no_bits_per_byte_are_reported_of_ids_without_a_text(made):
    m = made(measure={"validation": True})
    for trial in m.trials:
        m.finish(trial, [6.0, 4.0, 2.5, math.nan])
    row = _rows(m.report())["fir"]
    assert "bits_per_byte" not in row["measured"]
    assert "the ids stand for no text" in row["notes"]["bits_per_byte"]


def test_synthetic_task_results_come_from_the_last_evaluation(made, tmp_path):
    base = yaml.safe_load((tmp_path / "base.yaml").read_text())
    base |= {"data": {"synthetic": {"task": "copy", "lag": 4}}}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    experiment = made(measure={"validation": False, "task": True, "task_beyond": 4}, seeds=[0])
    for trial, accuracy in zip(experiment.trials, (0.25, 0.75), strict=True):
        experiment.finish(trial, [3.0, 2.0, 1.5, 1.0])
        metrics = experiment.state.directory(trial.name) / "metrics.jsonl"
        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
        last = {
            "kind": "eval",
            "step": 4,
            "loss_nats": 2 * accuracy,
            "accuracy": accuracy,
            "labels_by_distance": {"2-3": 100, "4-7": 10, "8-9": 30},
            "accuracy_by_distance": {"2-3": 0.9, "4-7": accuracy, "8-9": 0.5},
            "loss_by_distance": {"2-3": 0.1, "4-7": 1.0, "8-9": accuracy},
        }
        metrics.write_text("".join(json.dumps(line) + "\n" for line in [*lines, last]))
    found = experiment.report()
    for row, accuracy in zip(found["rows"], (0.25, 0.75), strict=True):
        assert row["measured"]["accuracy"]["value"] == accuracy
        assert row["measured"]["loss_nats"]["value"] == 2 * accuracy
        assert row["measured"]["accuracy_beyond"]["value"] == pytest.approx((accuracy + 3 * 0.5) / 4)
        assert row["measured"]["loss_nats_beyond"]["value"] == pytest.approx((1 + 3 * accuracy) / 4)
