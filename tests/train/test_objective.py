"""Training a classifier: the same on any number of ranks, and bitwise equal after a resume."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bst_base.errors import UserError
from bst_base.json_lines import read_lines
from bst_dist.checkpoint.directory import load_weights, newest_valid
from bst_dist.cli import main
from bst_dist.report.metrics import FILE
from bst_dist.study.lra.listops import ListOpsConfig
from bst_dist.study.lra.prepare import prepare
from bst_dist.train.start.request import Request, load, resolve
from data_pipeline.prepare.parallel import open_workers


@pytest.fixture
def task(recipe_file, tmp_path) -> Path:
    """The small recipe for a small ListOps task, with padding."""
    examples = tmp_path / "listops"
    config = ListOpsConfig(train=40, validation=12, test=10, max_depth=4, max_args=4, min_length=8, max_length=32)
    with open_workers(1) as workers:
        prepare(config, examples, workers, lambda *_: None)
    recipe = recipe_file(model={"vocab_size": 16}, train={"sequences": 8, "micro_sequences": 2})
    text = recipe.read_text()
    before, after = text.index("data:"), text.index("train:")
    recipe.write_text(text[:before] + f"data: {{task: listops, examples: {examples}}}\n" + text[after:])
    return recipe


@pytest.fixture
def go(task, train_in, unmeasured) -> Callable[..., Path]:
    """Train on the task; see `train_in`."""
    return train_in(task)


@pytest.mark.ranks
def test_two_ranks_train_a_classifier_like_one(go):
    one, two = go("one", "evaluation.sequences=12"), go("two", "evaluation.sequences=12", world=2)
    lines = [[line for line in read_lines(run / FILE) if line["kind"] in ("train", "eval")] for run in (one, two)]
    assert [line["step"] for line in lines[0]] == [1, 2, 3, 3, 4, 5, 6, 6]
    for alone, together in zip(*lines, strict=True):
        for key in {"tokens", "loss_nats", "gradient_norm", "accuracy"} & alone.keys():
            assert alone[key] == pytest.approx(together[key], rel=1e-5)
    weights = [load_weights(newest_valid(run)) for run in (one, two)]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=1e-3, atol=1e-5)


@pytest.mark.ranks
def test_resumed_classifier_equals_the_uninterrupted_one(go, assert_same_run):
    whole = go("whole", world=2)
    go("parts", world=2, until=4)
    assert_same_run(whole, go("parts", world=2, resume=True))


@pytest.mark.ranks
def test_evaluation_of_a_run_finds_the_accuracy_that_training_reported(go, capsys):
    run = go("run", "evaluation.sequences=12")
    outcome = json.loads((run / "outcome.json").read_text())
    assert outcome["finished"]
    assert math.isnan(outcome["bits_per_byte"])  # there is no text
    assert main(["lra", "eval", str(run), "--split", "validation", "--rows", "5"]) == 0
    kept = json.loads((run / "accuracy-validation.json").read_text())
    assert (kept["step"], kept["examples"], kept["accuracy"]) == (6, 12, outcome["validation_accuracy"])
    assert "of 12 examples of listops (validation)" in capsys.readouterr().out
    assert main(["eval", str(run)]) == 2
    assert "not a language model but a classifier for the task listops: use bst lra eval" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["train.sequence_length=16"], "the longest example has .* symbols and train.sequence_length holds 16"),
        (["data.examples=elsewhere"], "elsewhere/manifest.json: no prepared examples .* 'bst lra prepare'"),
        (["data.task=image", "model.vocab_size=257"], "examples of listops, not of image"),
    ],
)
def test_examples_that_the_recipe_cannot_use_are_refused_before_anything_is_written(task, tmp_path, changes, message):
    request = Request(task, changes, tmp_path / "run", resume=False, until=None)
    with pytest.raises(UserError, match=message):
        resolve(load(request), request, world=1)
