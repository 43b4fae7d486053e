"""Training on a synthetic task: the same in any layout, bitwise equal after a resume, evaluated by distance."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from bst_base.errors import UserError
from bst_base.json_lines import read_lines
from bst_dist.checkpoint.directory import load_weights, newest_valid
from bst_dist.cli import main
from bst_dist.config import load_recipe
from bst_dist.model.lm import LanguageModel
from bst_dist.parallel.mesh import Mesh
from bst_dist.report.metrics import FILE
from bst_dist.study.synthetic import SyntheticObjective, octave
from bst_dist.train.start.request import Request, load, resolve

TASK = "{synthetic: {task: associative-recall, pairs: 3, keys: 6, symbols: 6, span: 16}, prefetch: 0}"


@pytest.fixture
def task(recipe_file) -> Path:
    """The small recipe with a task instead of its corpus."""
    recipe = recipe_file()
    text = recipe.read_text()
    before, after = text.index("data:"), text.index("train:")
    recipe.write_text(text[:before] + f"data: {TASK}\n" + text[after:])
    return recipe


@pytest.fixture
def go(task, train_in, unmeasured) -> Callable[..., Path]:
    """Train on the task; see `train_in`."""
    return train_in(task)


def evaluations(run: Path) -> list[dict]:
    return [line for line in read_lines(run / FILE) if line["kind"] == "eval"]


@pytest.mark.ranks
def test_data_and_sequence_parallel_runs_equal_one_rank(go):
    one, dp, sp = go("one"), go("dp", world=2), go("sp", "parallel.sp=2", world=2)
    for other in (dp, sp):
        found = [[line for line in read_lines(run / FILE) if line["kind"] != "performance"] for run in (one, other)]
        assert [line["step"] for line in found[0]] == [1, 2, 3, 3, 4, 5, 6, 6]
        for alone, together in zip(*found, strict=True):
            assert alone["tokens"] == together["tokens"]
            assert alone["loss_nats"] == pytest.approx(together["loss_nats"], rel=1e-4)
            if alone["kind"] == "eval":
                assert alone["labels_by_distance"] == together["labels_by_distance"]
                assert alone["loss_by_distance"] == pytest.approx(together["loss_by_distance"], rel=1e-4)


@pytest.mark.ranks
def test_resumed_run_equals_the_uninterrupted_one_also_under_another_layout(go, assert_same_run):
    whole = go("whole")
    go("parts", until=4)
    assert_same_run(whole, go("parts", resume=True))
    go("elastic", until=4)
    elastic = go("elastic", "parallel.sp=2", world=2, resume=True)
    weights = [load_weights(newest_valid(run)) for run in (whole, elastic)]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=1e-3, atol=1e-5)


@pytest.mark.ranks
def test_metrics_by_distance_equal_those_of_single_rows(go, capsys):
    """Compared with plain torch on single rows. `bst eval` gives the same on the same rows."""
    run = go("run", "evaluation.sequences=5", "log.tensorboard=true")
    line = evaluations(run)[-1]
    recipe = load_recipe(run / "recipe.yaml")
    model = LanguageModel(recipe.model)
    model.load_state_dict(load_weights(newest_valid(run)))
    batches = SyntheticObjective(recipe)._validation(Mesh(1, 0), 5, 5).batches(0)
    found: dict[str, list[tuple[float, float]]] = {}
    for ids, labels, distances in zip(batches[0].input_ids, batches[0].labels, batches[0].distance, strict=True):
        logits = model.logits(model.hidden(torch.from_numpy(ids)[None])[0]).detach()
        for place in np.flatnonzero(distances):
            nats = F.cross_entropy(logits[place], torch.tensor(labels[place])).item()
            name = next(f"{2**k}-{min(2 * 2**k - 1, 32)}" for k in range(6) if distances[place] < 2 * 2**k)
            found.setdefault(name, []).append((float(logits[place].argmax() == labels[place]), nats))
    assert line["tokens"] == sum(map(len, found.values()))
    assert line["labels_by_distance"] == {name: len(of) for name, of in found.items()}
    assert line["accuracy_by_distance"] == pytest.approx({n: np.mean([a for a, _ in of]) for n, of in found.items()})
    assert line["loss_by_distance"] == pytest.approx({n: np.mean([b for _, b in of]) for n, of in found.items()}, 1e-4)
    assert (line["best_loss_nats"], math.isnan(line["bits_per_byte"])) == (0, True)
    assert "validation/accuracy_by_distance/8-15" in _tags(run)
    assert json.loads((run / "outcome.json").read_text())["validation_accuracy"] == line["accuracy"]

    capsys.readouterr()
    assert main(["eval", str(run), "--rows", "5", "--json", str(run / "eval.json")]) == 0
    report = json.loads((run / "eval.json").read_text())
    assert {f"{part['from']}-{part['to']}": part["labels"] for part in report["by_distance"]} == line[
        "labels_by_distance"
    ]
    assert report["loss_nats"] == pytest.approx(line["loss_nats"], rel=1e-4)
    assert report["accuracy"] == pytest.approx(line["accuracy"])
    assert "associative-recall" in capsys.readouterr().out


@pytest.mark.ranks
@pytest.mark.parametrize("changes", [[], ["train.slice_tokens=16"]])
def test_a_row_split_over_steps_equals_the_whole_row_without_learning(go, changes):
    """The past is carried from step to step, and dropped when the next row begins. Evaluations read whole rows."""
    fixed = [
        "optimizer.learning_rate=1e-30",
        "optimizer.ssm_learning_rate=1e-30",
        "optimizer.weight_decay=0",
        "data.synthetic.span=64",
    ]
    carried = go("carried", *fixed, *changes, "data.row_tokens=64", "train.carry=true", "train.steps=4")
    whole = go("whole", *fixed, "train.sequence_length=64", "train.steps=2")
    steps = [[line for line in read_lines(run / FILE) if line["kind"] == "train"] for run in (carried, whole)]

    def nats(lines: list[dict]) -> list[float]:
        """Return the summed loss of each step; `tokens` counts the labels up to a step."""
        before = [0, *(line["tokens"] for line in lines)]
        return [line["loss_nats"] * (line["tokens"] - seen) for line, seen in zip(lines, before, strict=False)]

    parts, rows = map(nats, steps)
    assert [sum(parts[:2]), sum(parts[2:])] == pytest.approx(rows, rel=1e-4)
    last, expected = evaluations(carried)[-1], evaluations(whole)[-1]
    assert last["labels_by_distance"] == expected["labels_by_distance"]
    assert last["loss_by_distance"] == pytest.approx(expected["loss_by_distance"], rel=1e-4)


def _tags(run: Path) -> list[str]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(run / "tensorboard")).Reload().Tags()["scalars"]


def test_distances_are_grouped_by_octave():
    assert octave(torch.tensor([0, 1, 2, 3, 4, 7, 8, 1023, 1024])).tolist() == [-1, 0, 1, 1, 2, 2, 3, 9, 10]


def test_the_vocabulary_size_defaults_to_that_of_the_task(task):
    assert load_recipe(task).model.vocab_size == 13
    assert load_recipe(task, ["model.vocab_size=20"]).model.vocab_size == 20


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["model.vocab_size=9"], "model.vocab_size 9: the task associative-recall has 13 tokens; leave it out"),
        (["data.synthetic.span=40"], "data.synthetic: span 40 does not fit into a row of 32 inputs"),
        (["data.synthetic.task=recall"], "data.synthetic: task must be one of .*associative-recall.*, not 'recall'"),
        (["train.carry=true"], "train.carry needs data.row_tokens"),
        (["train.carry=true", "data.row_tokens=32"], "rows of data.row_tokens 32 are read in one step"),
        (["data.row_tokens=40"], "data.row_tokens 40 is not a multiple of train.sequence_length 32"),
    ],
)
def test_recipes_that_the_task_cannot_generate_are_refused_before_writing(task, tmp_path, changes, message):
    request = Request(task, changes, tmp_path / "run", resume=False, until=None)
    with pytest.raises(UserError, match=message):
        resolve(load(request), request, world=1)
    assert not (tmp_path / "run").exists()


@pytest.mark.ranks
def test_text_commands_are_refused_for_synthetic_tasks(go, capsys, tmp_path):
    run = go("run")
    for command in (
        ["generate", run, "--prompt", "x"],
        ["export", run, tmp_path / "out"],
        ["eval", run, "--lengths", "8"],
        ["ablate", run],
    ):
        assert main([str(word) for word in command]) == 2
        assert "learns the synthetic task associative-recall, so it has no text" in capsys.readouterr().err
    assert main(["eval", str(run), "--length", "12"]) == 2
    assert "--length 12 is not a multiple of the model's block, 8" in capsys.readouterr().err
    assert main(["eval", str(run), "--context", "8"]) == 2
    assert "--context does not apply to this evaluation" in capsys.readouterr().err
