from __future__ import annotations

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from bst_base.errors import UserError
from bst_dist.checkpoint.directory import MANIFEST, WEIGHTS, directory, shard_file
from bst_dist.cli import main
from bst_dist.report.metrics import FILE
from bst_dist.study.comparison.equality import equality


def edit_metrics(run_dir, edit):
    lines = [json.loads(line) for line in (run_dir / FILE).read_text().splitlines()]
    (run_dir / FILE).write_text("".join(json.dumps(line) + "\n" for line in edit(lines)))


def test_equal_runs_pass_with_differences_of_zero(make_run, capsys, tmp_path):
    one, other = make_run("one"), make_run("other")
    assert main(["compare", "--equal", str(one), str(other), "--json", str(tmp_path / "report.json")]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["steps"], report["evaluations"]) == (4, 1)
    assert set(report["largest_difference"].values()) == {0.0}
    assert "equal to the last bit" in capsys.readouterr().out


def test_one_changed_bit_of_a_weight_is_detected(make_run, capsys):
    one, other = make_run("one"), make_run("other")
    path = directory(other, 4) / shard_file(WEIGHTS, 0)
    weights = load_file(path)
    before = weights["norm.weight"][3].clone()
    weights["norm.weight"][3] = torch.nextafter(before, torch.tensor(2.0))
    difference = float(weights["norm.weight"][3] - before)
    save_file(weights, path)
    manifest = json.loads((path.parent / MANIFEST).read_text())
    manifest["files"][path.name] |= {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    (path.parent / MANIFEST).write_text(json.dumps(manifest))
    found = equality(one, other)
    assert not found.passed
    assert found.largest_difference["weights"] == pytest.approx(difference, abs=0)
    assert main(["compare", "--equal", str(one), str(other)]) == 1
    assert "NOT equal" in capsys.readouterr().out


@pytest.mark.parametrize("value", [1.0000001, float("nan")])
def test_different_loss_at_one_step_makes_runs_unequal(make_run, value):
    one, other = make_run("one"), make_run("other")
    edit_metrics(other, lambda lines: [lines[0] | {"loss_nats": value}, *lines[1:]])
    found = equality(one, other)
    assert not found.passed and found.largest_difference["loss_nats"] > 0


@pytest.mark.parametrize("name", ["gradient_norm", "learning_rate", "bits_per_byte", "tokens"])
def test_every_quantity_is_compared_and_must_exist_in_both_runs(make_run, name):
    one, other = make_run("one"), make_run("other")
    edit_metrics(one, lambda lines: [line | {name: 1.0} for line in lines])
    edit_metrics(other, lambda lines: [line | {name: 1.0} for line in lines])
    assert equality(one, other).passed
    edit_metrics(other, lambda lines: [*lines[:2], lines[2] | {name: 1.5}, *lines[3:]])
    found = equality(one, other)
    assert not found.passed and found.largest_difference[name] == 0.5
    for first, second in ((one, other), (other, one)):
        edit_metrics(other, lambda lines: [{k: v for k, v in line.items() if k != name} for line in lines])
        assert not equality(first, second).passed


def test_extra_evaluation_of_a_stopped_run_is_ignored(make_run):
    one, other = make_run("one"), make_run("other")
    edit_metrics(other, lambda lines: [*lines, lines[-1] | {"step": 2}])
    assert equality(one, other).passed


def test_speed_is_not_compared(make_run):
    one, other = make_run("one"), make_run("other")
    edit_metrics(other, lambda lines: [line | {"tokens_per_s": 7} for line in lines])
    assert equality(one, other).passed


def test_runs_of_unequal_length_are_refused(make_run):
    one, other = make_run("one"), make_run("other")
    edit_metrics(other, lambda lines: lines[:3])
    with pytest.raises(UserError, match="only one of them has step 4"):
        equality(one, other)


def test_runs_with_different_last_checkpoints_are_refused(make_run):
    with pytest.raises(UserError, match="the runs are at different steps"):
        equality(make_run("one"), make_run("other", steps=(3,)))


def test_runs_with_different_seeds_are_not_equal(make_run):
    assert not equality(make_run("one"), make_run("other", seed=1)).passed


def test_error_names_the_first_step_missing_in_one_run(make_run):
    one, other = make_run("one"), make_run("other")
    edit_metrics(other, lambda lines: [*lines, *(lines[0] | {"step": step} for step in range(40, 4, -1))])
    with pytest.raises(UserError, match=r"only one of them has step 5$"):
        equality(one, other)
