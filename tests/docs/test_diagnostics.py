"""The page of the diagnostics equals its program's output, and that program decides by the registered rule."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from data_pipeline.synthetic.unigram import LatentUnigram

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "docs/study"))
import decisions  # noqa: E402 - programs of the documentation, which are no part of a package
import diagnostics as page  # noqa: E402


def table(experiment, accuracy, statuses=None):
    """Return the table of an experiment with all runs done; `accuracy`: function of (lag, depth, arm, seed)."""
    rows = []
    for condition in experiment.settings["conditions"]:
        lag, depth = experiment.of(condition, "data.synthetic.lag"), experiment.of(condition, "model.depth")
        for arm in experiment.settings["arms"]:
            values = {str(seed): accuracy(lag, depth, arm, seed) for seed in (0, 1)}
            estimate = {"value": float(np.mean(list(values.values()))), "standard_error": 0.01, "by_seed": values}
            rows.append(
                {
                    "condition": condition,
                    "arm": arm,
                    "parameters": 45000,
                    "difference": {},
                    "seeds": {"0": "done", "1": (statuses or {}).get(condition, "done")},
                    "measured": {"accuracy": estimate, "loss_nats": estimate},
                }
            )
    return {"rows": rows, "trained_with": "Trained with commit abc."}


def copying(accuracy, **changes):
    found = next(e for e in page.load() if e.name == "small-copy")
    return page.Experiment(found.name, found.settings, table(found, accuracy, **changes))


def as_predicted(lag, depth, arm, seed):
    seen = depth * 15 + 1 >= lag
    return 0.9 if arm == "bst-sh" or seen else 0.06


def test_the_page_equals_the_program_output():
    text = page.PAGE.read_text()
    assert page.rewrite(text, page.build(page.load())) == text


def test_all_registered_runs_are_counted_once():
    """The registered page has 288 runs (files of a small task share those of bst-sh), its additions 162, 12 and 72."""
    assert "of 534 runs are done" in page.build(page.load())


def test_lags_beyond_the_reach_of_windows_are_the_registered_ones():
    experiments = {e.name: e for e in page.load()}
    hidden = {
        name: [c for c in experiments[name].settings["conditions"] if experiments[name].hidden(c)]
        for name in ("small-copy", "copy")
    }
    assert hidden["small-copy"] == ["lag 32, 2 layers", "lag 64, 2 layers", "lag 64, 4 layers"]
    assert hidden["copy"] == ["lag 256, 2 layers", "lag 256, 4 layers", *(f"lag 768, {n} layers" for n in (2, 4, 8))]


def test_predictions_hold_or_name_the_contradicting_runs():
    text = page.build([copying(as_predicted)])
    assert "**P1** holds: 12 of 12 runs" in text  # three cells, two arms, two seeds
    assert "**P2** holds: 12 of 12 runs" in text
    assert "**P3** holds: 18 of 18 runs" in text

    def one_sees(lag, depth, arm, seed):
        odd = (lag, depth, arm, seed) == (32, 2, "no-ssm", 1)
        return 0.081 if odd else as_predicted(lag, depth, arm, seed)

    text = page.build([copying(one_sees)])
    assert "**P1** does not hold: 11 of 12 runs are as predicted; against it lag 32, 2 layers, no-ssm: 0.081." in text


def no_advantage(lag, depth, arm, seed):
    return 0.9 + 0.01 * seed if depth * 15 + 1 >= lag else 0.06


def seeds_differ(lag, depth, arm, seed):
    return as_predicted(lag, depth, arm, seed) + (0.5 if arm == "bst-sh" and depth == 8 else 0.0) * seed


@pytest.mark.parametrize(
    ("accuracy", "verdict"),
    [
        (as_predicted, "**Falls**: the advantage of `bst-sh` over `sliding` is +0.840 ± 0.000 where the stack"),
        (lambda *of: 0.9 - 0.84 * (as_predicted(*of) > 0.5), "**Does not fall**: the advantage of `bst-sh`"),
        (seeds_differ, "**Undecided**"),
        (no_advantage, "**Undecided**: the advantage of `bst-sh` over `sliding` is +0.000 ± 0.000"),
    ],
)
def test_the_page_first_tells_whether_the_advantage_falls(accuracy, verdict):
    """Lags 32 and 64 are within reach at some depths and beyond it at others; lag 16 is always within reach."""
    lines = page.build([copying(accuracy)]).splitlines()
    assert "does the advantage fall where windows reach the lag?" in lines[0]
    assert verdict in lines[2]
    assert "| 32 | sliding | " in "\n".join(lines[:16])
    assert lines[-1]


def test_the_fall_is_a_mean_over_lags_of_means_over_depths():
    def gain(lag, depth, arm, seed):
        return {(32, 2): 0.5, (32, 4): 0.3, (32, 8): 0.1, (64, 2): 0.4, (64, 4): 0.2, (64, 8): 0.2}.get(
            (lag, depth), 9.0
        ) * (arm == "bst-sh") + 0.01 * seed * (arm == "bst-sh") * (depth == 2)

    (line,) = (x for x in page.build([copying(gain)]).splitlines() if "`bst-sh` over" in x)
    # beyond: (0.5 + (0.4 + 0.2) / 2) / 2 = 0.4, and 0.0075 more with seed 1; within: (0.2 + 0.2) / 2
    assert "is +0.404 ± 0.004 where" in line
    assert "where it does: a decrease of 0.204 ± 0.004 (95 % interval +0.16 to +0.25; negative: an increase)" in line


def test_there_is_no_answer_before_all_lags_are_done():
    text = page.build([copying(as_predicted, statuses={"lag 64, 4 layers": "running", "lag 16, 2 layers": "running"})])
    told = "**No answer yet** about the advantage of `bst-sh` over `sliding`: runs of lag 16 and lag 64 are missing."
    assert told in text and "Falls" not in text
    assert "| 64 | bst-sh | 0.900 ± 0.000 † |  | 0.900 ± 0.000 |" in text


def test_the_figure_is_written_as_png(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "FIGURES", tmp_path)
    page.draw_figures([copying(as_predicted)])
    assert (tmp_path / "diagnostics-small-copy.png").read_bytes()[:4] == b"\x89PNG"


def test_unfinished_conditions_are_neither_shown_nor_judged():
    text = page.build([copying(as_predicted, statuses={"lag 16, 2 layers": "running"})])
    assert "| lag 16, 2 layers |" not in text
    assert "| `small-copy.yaml` | 51 of 54 | 8 of 9 |" in text
    assert "**P3** undecided: 16 of 16 runs are as predicted; conditions with missing runs: 1." in text


@pytest.mark.parametrize(
    ("ratios", "answer"), [((0.1, 0.11), "P5 holds"), ((0.9, 0.91), "P4 holds"), ((0.1, 0.9), "undecided")]
)
def test_the_ratio_is_judged_by_its_interval(ratios, answer):
    assert decisions.ratio_verdict(np.ones(2), np.array(ratios)).startswith(answer)


def test_without_an_advantage_at_two_layers_a_ratio_decides_nothing():
    """The ratio of two disadvantages would be far above 1/2."""
    told = decisions.ratio_verdict(np.array([-0.1, -0.1]), np.array([-0.2, -0.201]))
    assert told.startswith("undecided. `bst-sh` has no advantage at 2 layers (-0.1000 nats")


def test_the_difference_of_advantages_has_the_interval_of_a_paired_t_test():
    falls = np.array([0.02, 0.05, 0.03, 0.06])
    low, high = stats.ttest_1samp(falls, 0).confidence_interval(0.95)
    assert f"{falls.mean():+.4f} nats per label in the mean (95 % interval {low:+.3f} to {high:+.3f})" in (
        decisions.difference(falls)
    )


@pytest.mark.parametrize(
    "accuracy, answer",
    [
        ({"rate 3e-3": (0.9, 0.6)}, "holds"),
        ({"rate 3e-3": (0.9, 0.4), "rate 1e-2": (0.1, 0.9)}, "depends on the seed"),
        ({"rate 1e-2": (0.5, 0.5)}, "does not hold"),
    ],
)
def test_windows_have_learnt_if_both_seeds_learn_at_one_rate(accuracy, answer):
    found = next(e for e in page.load() if e.name == "reach")
    rows = [
        {
            "condition": rate,
            "arm": arm,
            "seeds": {"0": "done", "1": "done"},
            "measured": {"accuracy": {"by_seed": dict(zip("01", values, strict=True))}},
        }
        for rate in found.settings["conditions"]
        for arm, values in (("sliding", accuracy.get(rate, (0.06, 0.06))), ("bst-sh", (1.0, 1.0)))
    ]
    assert decisions.reach_verdict(page.Experiment(found.name, found.settings, {"rows": rows})).startswith(
        f"**P7** {answer}:"
    )
    rows[-1]["seeds"]["1"] = "missing"
    assert "not all runs" in decisions.reach_verdict(page.Experiment(found.name, found.settings, {"rows": rows}))


def states(name, accuracy):
    """Return an experiment on other states with all runs done; `accuracy`: values by seed for (condition, arm)."""
    found = next(e for e in page.load() if e.name == name)
    rows = [
        {
            "condition": condition,
            "arm": arm,
            "seeds": dict.fromkeys(map(str, found.settings["seeds"]), "done"),
            "measured": {"accuracy": {"by_seed": dict(enumerate(accuracy(condition, arm)))}},
        }
        for condition in found.settings["conditions"]
        for arm in found.settings["arms"]
    ]
    return page.Experiment(found.name, found.settings, {"rows": rows})


def test_gated_deltanet_must_learn_the_shorter_lag_and_copy_more_at_the_longer():
    def as_registered(condition, arm):
        return {"gated-deltanet": (0.6, 0.4) if "lag 64" in condition else (0.51, 0.9)}.get(arm, (0.4, 0.5))

    def behind(condition, arm):
        worse = condition == "lag 64, 8 layers" and arm == "gated-deltanet"
        return (0.2, 0.6) if worse else as_registered(condition, arm)

    holds = decisions.copying_by_states(states("states-copy", as_registered))
    assert holds == "**P8** holds: 9 of 9 runs and means are as predicted."  # three depths: two seeds, and a mean
    against = decisions.copying_by_states(states("states-copy", behind))
    assert against.startswith("**P8** does not hold: 8 of 9")
    assert against.endswith("against it lag 64, 8 layers, gated-deltanet minus bst-sh: -0.050.")


@pytest.mark.parametrize(
    ("arms", "verdict"),
    [
        ({"gated-deltanet": (0.9, 0.6, 0.51), "bst-sh": (0.3, 0.5, 0.3)}, "holds: 8 of 8 runs and means"),
        ({"gated-deltanet": (0.9, 0.9, 0.5), "bst-sh": (0.3, 0.3, 0.3)}, "does not hold: 6 of 8"),
        ({"gated-deltanet": (0.9, 0.9, 0.9), "bst-sh": (0.3, 0.6, 0.4)}, "does not hold: 6 of 8"),
    ],
)
def test_recall_is_predicted_of_gated_deltanet_and_not_of_bst_sh(arms, verdict):
    """Windows have 0.3, so a mean of 0.4 or more contradicts the prediction."""
    found = states("states-recall", lambda condition, arm: arms.get(arm, (0.3, 0.3, 0.3)))
    assert decisions.recall(found).startswith(f"**P9** {verdict}")


def test_best_in_reach_is_the_best_loss_where_everything_is_in_reach():
    task = LatentUnigram(task="latent-unigram", symbols=16, concentration=0.2)
    assert page.best_within(task, 256, 256) == pytest.approx(task.best_loss(1, 256))
    assert page.best_within(task, 31, 256) - task.best_loss(1, 256) == pytest.approx(0.086, abs=5e-4)  # registered


def run_directory(root, name, finished=True):
    run = root / "runs" / name
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text(f"name: {name}\n")
    (run / "environment.json").write_text("{}")
    (run / "outcome.json").write_text(json.dumps({"finished": finished}))
    lines = [{"kind": kind, "step": step} for step in (1, 2) for kind in ("train", "eval", "performance")]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_finished_runs_are_archived_and_earlier_archived_runs_stay(tmp_path):
    run_directory(tmp_path / "first", "a")
    run_directory(tmp_path / "second", "b")
    run_directory(tmp_path / "second", "stopped", finished=False)
    archive = tmp_path / "runs.tar.xz"
    page.keep_runs(tmp_path / "first", archive)
    page.keep_runs(tmp_path / "second", archive)
    kept = page.read_archive(archive)
    assert {name.split("/")[1] for name in kept} == {"a", "b"}
    lines = [json.loads(line) for line in kept["runs/a/metrics.jsonl"].splitlines()]
    assert lines == [{"kind": "eval", "step": 1}, {"kind": "train", "step": 2}, {"kind": "eval", "step": 2}]
    before = archive.read_bytes()
    page.keep_runs(tmp_path / "second", archive)
    assert archive.read_bytes() == before
