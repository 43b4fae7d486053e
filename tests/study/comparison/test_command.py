from __future__ import annotations

import json
import math
import os
import time

import numpy as np
import pytest
import yaml

from bst_dist.cli import main
from bst_dist.faults.lease import LEASE
from bst_dist.model.lm import LanguageModel
from bst_dist.report.metrics import FILE
from bst_dist.study.comparison.command import compare
from bst_dist.study.comparison.figure import draw
from bst_dist.study.comparison.run_summary import eval_report, summarise
from bst_dist.train.rundir import OUTCOME, RECIPE


def write(run_dir, lines):
    (run_dir / FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))


def train(step, loss, text_bytes=20.0, seconds=2.0):
    return {
        "kind": "train",
        "step": step,
        "tokens": 10 * step,
        "loss_nats": loss,
        "step_time_s": seconds,
        "bits_per_byte": loss * 10 / math.log(2) / text_bytes,
        "tokens_per_s": 10 / seconds,
    }


def evaluation(step, blocks, text_bytes=50.0):
    loss = sum(blocks) / len(blocks)
    return {
        "kind": "eval",
        "split": "validation",
        "step": step,
        "tokens": 30,
        "loss_nats": loss,
        "time_s": 1.0,
        "bits_per_byte": loss * 30 / math.log(2) / text_bytes,
        "loss_by_block": blocks,
    }


@pytest.fixture
def pair(make_run):
    """Two runs on the same text; the second has 0.5 nats less training loss, and is longer."""
    one, other = make_run("one"), make_run("other")
    text_bytes = [20.0, 17.0, 23.0, 19.0, 31.0, 13.0]
    losses = [5.0, 4.5, 4.75, 4.0, 3.5, 3.0]
    write(one, [*(train(s + 1, losses[s], text_bytes[s]) for s in range(4)), evaluation(4, [4.0, 3.0, 2.0])])
    write(
        other,
        [
            *(train(s + 1, losses[s] - 0.5 - 0.25 * (s == 3), text_bytes[s]) for s in range(6)),
            evaluation(4, [3.5, 2.5, 1.0]),
            evaluation(6, [3.0, 2.0, 1.0]),
        ],
    )
    return one, other


def compared(*runs):
    return compare({str(number): summarise(run_dir) for number, run_dir in enumerate(runs)}).report()


def test_differences_are_paired_for_steps_with_equal_text(pair):
    first, second = compared(*pair)["runs"]
    assert "train_difference_nats" not in first
    assert second["train_difference_steps"] == [1, 4]
    assert second["train_difference_nats"] == pytest.approx(-(0.5 * 3 + 0.75) / 4)
    assert second["train_difference_nats_standard_error"] == pytest.approx(0.125 / 2)  # sd of (0, 0, 0, 1/4), over √4
    assert second["validation_difference_step"] == 4
    assert second["validation_difference_nats"] == pytest.approx(-2 / 3)
    # The blocks of a sequence are positions, not samples, so their spread gives no standard error of the mean.
    assert not [key for key in second if key.startswith("validation_difference") and "error" in key]


def test_steps_with_other_text_are_not_paired_despite_equal_bytes(pair, make_run):
    odd = make_run("odd")
    write(odd, [train(1, 4.0, 20.0), train(2, 4.0, 30.0), train(3, 4.0, 40.0), evaluation(4, [1.0, 1.0, 1.0], 51.0)])
    assert not [key for key in compared(pair[0], odd)["runs"][1] if "difference" in key]


def test_compared_figures_equal_those_of_the_metrics_file(pair):
    _, second = compared(*pair)["runs"]
    assert (second["step"], second["tokens"]) == (6, 60)
    assert second["train_loss_nats"] == pytest.approx(sum([4.5, 4.0, 4.25, 3.25, 3.0, 2.5]) / 6)
    assert second["validation_loss_nats"] == 2.0
    assert second["time_s"] == 6 * 2.0 + 2 * 1.0
    assert second["parameters"] == sum(p.numel() for p in LanguageModel(_model(pair[1])).parameters())


def test_time_does_not_include_compilation(make_run):
    run_dir = make_run()
    write(
        run_dir,
        [*(train(step, 4.0, seconds=90.0 if step < 3 else 2.0) for step in range(1, 11)), evaluation(10, [4.0])],
    )
    assert summarise(run_dir).figures().time_s == 10 * 2.0 + 1.0
    over_time = draw({"run": summarise(run_dir)}).axes[1]
    assert max(line.get_xdata()[-1] for line in over_time.lines) == 10 * 2.0


def _model(run_dir):
    from bst_dist.train.rundir import read_recipe

    return read_recipe(run_dir).model


def test_only_fields_that_differ_are_shown_with_all_values(pair, make_run):
    third = make_run("third")
    recipe = yaml.safe_load((third / RECIPE).read_text())
    recipe["name"] = "another"
    recipe["model"]["width"] = 32
    recipe["task"] = {"name": "listops"}  # a run of another kind has other fields
    (third / RECIPE).write_text(yaml.safe_dump(recipe))
    assert compared(*pair, third)["recipe_differences"] == {
        "model.width": [16, 16, 32],
        "task.name": [None, None, "listops"],
    }


def test_eval_report_of_the_last_step_is_used(pair):
    corpora = [{"corpus": "corpora/a", "documents": 7, "bits_per_byte": 2.25, "bits_per_byte_standard_error": 0.125}]
    report = {"command": "bst eval", "step": 4, "split": "validation", "context_tokens": None, "corpora": corpora}
    (pair[0] / "reports").mkdir()
    (pair[0] / "reports" / "after.json").write_text(json.dumps(report))
    (pair[0] / "reports" / "before.json").write_text(json.dumps(report | {"step": 0, "corpora": [{}]}))
    (pair[0] / "reports" / "broken.json").write_text("{")
    first, second = compared(*pair)["runs"]
    assert first["scored"] == {"a": {"documents": 7, "bits_per_byte": 2.25, "bits_per_byte_standard_error": 0.125}}
    assert "scored" not in second


def test_report_of_another_corpus_or_precision_does_not_replace_the_own_one(pair):
    """Once, the newest report was used, whatever it was of."""
    run_dir = pair[0]
    corpora = [{"path": "/data/a", "sha256": "1" * 64}, {"path": "/data/b", "sha256": "2" * 64}]
    (run_dir / "environment.json").write_text(json.dumps({"starts": [{"corpora": corpora}]}))
    report = {"command": "bst eval", "step": 4, "split": "validation", "context_tokens": None, "precision": "fp32"}

    def keep(age, *hashes, **changes):
        path = run_dir / f"{age}.json"
        scored = [{"corpus": f"/moved/{sha256[:1]}", "sha256": sha256, "documents": age} for sha256 in hashes]
        path.write_text(json.dumps(report | {"corpora": scored} | changes))
        os.utime(path, (1e9 - age, 1e9 - age))

    def used():
        found = eval_report(run_dir, 4)
        return found and found["corpora"][0]["documents"]  # the age

    keep(1, "1" * 64, "2" * 64, precision="bf16")
    assert used() is None
    keep(2, "3" * 64)
    assert used() == 2
    keep(3, "1" * 64)  # a part of the run's corpora
    assert used() == 2
    keep(5, "2" * 64, "1" * 64)
    assert used() == 5
    keep(4, "1" * 64, "2" * 64)
    assert used() == 4


def test_each_evaluated_corpus_has_its_own_row(pair, capsys):
    """The first run was evaluated on two corpora, the second on one of them and on a third."""
    report = {"command": "bst eval", "split": "validation", "context_tokens": None}
    for run_dir, step, names in zip(pair, (4, 6), (("a", "b"), ("b", "c")), strict=True):
        corpora = [
            {
                "corpus": f"/data/{name}",
                "documents": 2,
                "document_nats": [3.0 + step, 5.0],
                "document_bytes": [10, 20],
                "bits_per_byte": ord(name) / 100,
            }
            for name in names
        ]
        (run_dir / "eval.json").write_text(json.dumps(report | {"step": step, "corpora": corpora}))
    assert main(["compare", *map(str, pair)]) == 0
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if "documents of" in line]
    assert ["0.9700" in rows[0], "–" in rows[0]] == [True, True]
    assert rows[1].count("0.9800") == 2
    assert ["0.9900" in rows[2], "–" in rows[2]] == [True, True]
    _, second = compared(*pair)["runs"]
    assert list(second["scored_difference"]) == ["b"]
    assert second["scored_difference"]["b"]["bits_per_byte"] == pytest.approx(2 / 30 / math.log(2))


def test_footnotes_are_numbered_consecutively_from_1(pair, capsys):
    for run_dir in pair:
        write(run_dir, [])
        corpora = [
            {"corpus": "/data/a", "documents": 1, "document_nats": [3.0], "document_bytes": [10], "bits_per_byte": 0.5}
        ]
        report = {"command": "bst eval", "split": "validation", "context_tokens": None, "step": 0, "corpora": corpora}
        (run_dir / "eval.json").write_text(json.dumps(report))
    assert main(["compare", *map(str, pair)]) == 0
    out = capsys.readouterr().out
    assert "documents of a, bits per byte ¹" in " ".join(out.split())
    assert "¹ `bst eval` of 1 whole documents" in out
    assert not set("³⁴⁵") & set(out)


def test_documents_are_paired_only_if_they_are_equal(pair):
    report = {"command": "bst eval", "split": "validation", "context_tokens": None}
    nats, bytes_ = np.array([[3.0, 8.0, 5.0], [2.5, 7.5, 5.5]]), [10, 20, 30]
    for run_dir, step, scored in zip(pair, (4, 6), nats.tolist(), strict=True):
        corpus = {"documents": 3, "document_nats": scored, "document_bytes": bytes_, "bits_per_byte": 1.0}
        (run_dir / "eval.json").write_text(json.dumps(report | {"step": step, "corpora": [corpus]}))
    _, second = compared(*pair)["runs"]
    difference = (nats[1] - nats[0]) / math.log(2)
    value = difference.sum() / 60
    error = math.sqrt(3 / 2 * ((difference - value * np.array(bytes_)) ** 2).sum()) / 60
    found = second["scored_difference"]["documents"]
    assert found["bits_per_byte"] == pytest.approx(value)
    assert found["bits_per_byte_standard_error"] == pytest.approx(error)
    corpus["document_bytes"] = [10, 21, 30]
    (pair[1] / "eval.json").write_text(json.dumps(report | {"step": 6, "corpora": [corpus]}))
    assert "scored_difference" not in compared(*pair)["runs"][1]


@pytest.mark.parametrize(
    ("outcome", "beat_age_s", "status"),
    [
        ({"finished": True}, None, "finished"),
        ({"finished": False, "stopped": "SIGTERM"}, None, "stopped"),
        ({"finished": False}, None, "stopped"),
        ({"finished": False, "diverged": "the loss is nan"}, None, "diverged"),
        (None, 1.0, "running"),
        (None, 600.0, "broken off"),
        (None, None, "broken off"),
    ],
)
def test_status_of_a_run_is_derived_from_its_files(pair, outcome, beat_age_s, status):
    run_dir = pair[0]
    if outcome:
        (run_dir / OUTCOME).write_text(json.dumps(outcome))
    if beat_age_s:
        (run_dir / LEASE).mkdir()
        (run_dir / LEASE / "epoch-00000001.json").write_text("{}")
        os.utime(run_dir / LEASE / "epoch-00000001.json", (time.time() - beat_age_s,) * 2)
    assert summarise(run_dir).status.word == status


def test_compare_accepts_runs_of_any_kind_and_length(pair, make_run, tmp_path, capsys):
    odd = tmp_path / "odd"
    odd.mkdir()
    (odd / RECIPE).write_text("task: listops\nwidth: 3\n")
    write(odd, [{"kind": "train", "step": 1, "accuracy": 0.5}, {"kind": "eval", "step": 1, "accuracy": 0.25}])
    empty = make_run("empty")
    write(empty, [])
    assert main(["compare", *map(str, (*pair, odd, empty, make_run("more"), make_run("most")))]) == 0
    out = capsys.readouterr().out
    assert "0.2500" in out
    assert "no step yet" in out


def test_the_curves_are_drawn_over_tokens_and_time(pair, tmp_path, capsys):
    assert main(["compare", *map(str, pair), "--plot", str(tmp_path / "deep/compared.png")]) == 0
    assert (tmp_path / "deep/compared.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(SystemExit, match="2"):
        main(["compare", *map(str, pair), "--plot", str(tmp_path / "compared.docx")])
    assert "must be one of .png" in capsys.readouterr().err


def test_curves_that_cannot_be_written_lose_no_number(pair, tmp_path, no_room_for_figures):
    report = tmp_path / "report.json"
    words = ["--plot", str(tmp_path / "compared.png"), "--json", str(report)]
    assert main(["compare", *map(str, pair), *words]) == 74
    assert len(json.loads(report.read_text())["runs"]) == 2


@pytest.mark.parametrize("extra", [[], ["--plot", "x.png"]])
def test_directory_without_a_run_gives_one_message(pair, tmp_path, capsys, extra):
    assert main(["compare", str(pair[0]), str(tmp_path), *extra]) == 2
    assert f"{tmp_path}: no run there" in capsys.readouterr().err


def test_compare_needs_two_runs(pair, capsys):
    assert main(["compare", str(pair[0]), str(pair[0])]) == 2
    assert main(["compare", str(pair[0]), "--equal"]) == 2
    assert "two runs" in capsys.readouterr().err
