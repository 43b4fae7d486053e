"""Accuracies with their uncertainty, compared with an independent computation, and the table over seeds."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from scipy import optimize, stats

from bst_base.settings import dump, parse
from bst_dist.cli import main
from bst_dist.config import Recipe
from bst_dist.study.lra.accuracy import Accuracy
from bst_dist.study.lra.evaluate import Report, keep
from bst_dist.study.lra.table import means, rows


@pytest.mark.parametrize(("correct", "examples"), [(0, 50), (3, 50), (1234, 4000), (50, 50)])
def test_interval_equals_the_inverted_score_test(correct, examples):
    found, share = Accuracy(correct, examples), correct / examples
    low, high = found.interval()

    def rejected(p: float) -> float:
        return abs(share - p) / np.sqrt(p * (1 - p) / examples) - stats.norm.ppf(0.975)

    tiny = 1e-9
    assert low == pytest.approx(optimize.brentq(rejected, tiny, share - tiny) if correct else 0, abs=1e-6)
    assert high == pytest.approx(
        optimize.brentq(rejected, share + tiny, 1 - tiny) if correct < examples else 1, abs=1e-6
    )


def test_standard_error_equals_the_spread_of_simulated_samples():
    drawn = np.random.default_rng(0).binomial(400, 0.3, 20_000) / 400
    assert Accuracy(120, 400).standard_error == pytest.approx(drawn.std(), rel=0.03)


def run_directory(path, settings, seed, correct, **changes):
    path.mkdir()
    (path / "recipe.yaml").write_text(dump(parse(Recipe, settings | {"seed": seed, "name": path.name} | changes)))
    keep(
        path,
        Report(
            "listops",
            "test",
            step=6,
            parameters=1000,
            **Accuracy(correct, 1000).report(),
            majority_class=3,
            majority_accuracy=0.12,
            examples_sha256="a",
        ),
    )
    return str(path)


def test_table_takes_means_over_seeds_of_the_same_recipe(tmp_path, settings, capsys):
    full = {"model": {**settings["model"], "mixer": "full"}}
    runs = [
        run_directory(tmp_path / "one", settings, 1, 400),
        run_directory(tmp_path / "two", settings, 2, 500),
        run_directory(tmp_path / "full", settings, 1, 300, **full),
    ]
    report = tmp_path / "report.json"
    assert main(["lra", "table", *runs, "--json", str(report)]) == 0
    printed = capsys.readouterr().out
    assert "always the most frequent class: 12.00%" in printed
    assert "40.00% ± 1.55%" in printed
    bst, other = json.loads(report.read_text())["means"]
    assert (bst["model"], bst["seeds"], bst["accuracy_mean"]) == ("bst-SH, 2 x 16", 2, 0.45)
    assert bst["accuracy_mean_standard_error"] == pytest.approx(0.05)  # of 0.4 and 0.5
    assert (other["model"], other["accuracy_mean_standard_error"]) == ("full, 2 x 16", None)


def test_table_error_for_an_unevaluated_run_names_the_command(tmp_path, settings, capsys):
    run = run_directory(tmp_path / "one", settings, 1, 400)
    assert main(["lra", "table", run, "--split", "validation"]) == 2
    assert f"bst lra eval {run} --split validation" in capsys.readouterr().err


def test_runs_of_other_steps_are_no_further_seeds(tmp_path, settings):
    for name, seed in (("one", 1), ("two", 2)):
        run_directory(tmp_path / name, settings, seed, 400)
    found = rows([tmp_path / "one", tmp_path / "two"], "test")
    short = replace(found[1], report=replace(found[1].report, step=2, accuracy=0.1))
    assert [(m.step, m.seeds, m.accuracy_mean.value) for m in means([found[0], short])] == [(6, 1, 0.4), (2, 1, 0.1)]
    assert [m.seeds for m in means(found)] == [2]


def test_table_refuses_the_same_run_twice(tmp_path, settings, capsys):
    one, copy = (run_directory(tmp_path / name, settings, 1, 400) for name in ("one", "copy"))
    assert main(["lra", "table", one, copy]) == 2
    assert f"{one} and {copy}: the same recipe and seed after the same steps" in capsys.readouterr().err
