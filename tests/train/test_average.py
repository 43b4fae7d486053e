"""Averaged weights: equal to a literal average in one process, bitwise equal after a resume, in any layout."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bst_base.json_lines import read_lines
from bst_dist.checkpoint.directory import AVERAGE as AVERAGE_TENSOR
from bst_dist.checkpoint.directory import AVERAGED, WEIGHT, WEIGHTS, directory, load_weights, open_shards
from bst_dist.cli import main
from bst_dist.report.metrics import FILE
from bst_dist.study.evaluation.trained import open_run
from bst_dist.train.average import Average, decay
from bst_dist.train.config import AverageConfig

AVERAGE = "train.average={decay: 0.4}"


@pytest.fixture
def go(recipe_file, train_in):
    """Train the small recipe with a checkpoint per step; see `train_in`."""
    return train_in(recipe_file(checkpoint={"every": 1, "keep_last": 9}, train={"steps": 5, "sequences": 8}))


def averages(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    return load_weights(directory(run_dir, step), AVERAGED)


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_averaging_factor_grows_to_the_decay():
    config = AverageConfig(decay=0.9)
    assert [decay(config, step) for step in (1, 8, 1000)] == [2 / 11, 0.5, 0.9]


def test_an_error_in_an_evaluation_begins_no_further_collective():
    """The ranks without the error are elsewhere: the error must be reported, not wait for them."""
    fragment = SimpleNamespace(values={AVERAGE_TENSOR: torch.zeros(2), WEIGHT: torch.ones(2)})
    published = []
    state = SimpleNamespace(held=lambda: [fragment], publish=lambda: published.append(1))
    average = Average(AverageConfig(), state)
    with average.in_place():
        assert fragment.values[WEIGHT].tolist() == [0, 0]
    assert (fragment.values[WEIGHT].tolist(), len(published)) == ([1, 1], 2)
    with pytest.raises(torch.OutOfMemoryError), average.in_place():
        raise torch.OutOfMemoryError("on this rank only")
    assert len(published) == 3


@pytest.mark.ranks
@pytest.mark.parametrize(("world", "stage"), [(1, 0), (2, 0), (2, 1), (2, 2), (2, 3)])
def test_the_average_equals_the_formula_and_does_not_change_training(go, tmp_path, unmeasured, world, stage):
    zero = f"deepspeed=ds_configs/zero{stage}.json"
    run, without = go("run", zero, AVERAGE, world=world), go("without", zero, world=world)
    literal = {name: tensor.double() for name, tensor in open_run(run, 0).model.state_dict().items()}
    for step in range(1, 6):
        weights = load_weights(directory(run, step))
        assert equal(weights, load_weights(directory(without, step)))
        share = min(0.4, (1 + step) / (10 + step))
        literal = {name: share * literal[name] + (1 - share) * weights[name].double() for name in literal}
        for name, tensor in averages(run, step).items():
            torch.testing.assert_close(tensor.double(), literal[name], rtol=1e-6, atol=1e-7)
    assert not equal(averages(run, 5), load_weights(directory(run, 5)))
    kinds = [line["kind"] for line in read_lines(run / FILE) if line["kind"] not in ("train", "performance")]
    assert kinds == ["eval", "averaged"] * 2


@pytest.mark.ranks
@pytest.mark.parametrize("stage", [1, 3])
def test_the_average_survives_a_resume_and_another_layout(go, unmeasured, stage):
    zero = f"deepspeed=ds_configs/zero{stage}.json"
    whole, parts = go("whole", zero, AVERAGE, world=2), go("parts", zero, AVERAGE, world=2, until=3)
    go("parts", zero, AVERAGE, world=2, resume=True)
    assert equal(averages(whole, 5), averages(parts, 5))
    other = go("other", zero, AVERAGE, world=2, until=3)
    go("other", "deepspeed=ds_configs/zero2.json", AVERAGE, world=1, resume=True)
    for name, tensor in averages(other, 5).items():  # only the rounding of gradients differs
        torch.testing.assert_close(tensor, averages(whole, 5)[name], rtol=1e-4, atol=1e-5)


@pytest.mark.ranks
def test_averaging_can_start_and_end_at_a_resume(go, unmeasured):
    run = go("run", until=2)
    go("run", AVERAGE, until=3, resume=True)
    begun = load_weights(directory(run, 2))  # the average before step 3
    share = min(0.4, 4 / 13)
    weights = load_weights(directory(run, 3))
    for name, tensor in averages(run, 3).items():
        torch.testing.assert_close(tensor, share * begun[name] + (1 - share) * weights[name], rtol=1e-5, atol=1e-6)
    go("run", resume=True)
    assert not list(directory(run, 5).glob("averaged-*"))
    assert equal(load_weights(directory(run, 5)), load_weights(directory(go("whole"), 5)))


@pytest.mark.ranks
def test_averaged_weights_are_evaluated_and_exported(go, tmp_path, unmeasured, capsys):
    run = go("run", AVERAGE, "evaluation.sequences=9", world=2)
    told = {line["kind"]: line for line in read_lines(run / FILE) if line["step"] == 5}
    for kind, averaged in (("eval", False), ("averaged", True)):
        trained = open_run(run, averaged=averaged)
        assert equal(trained.model.state_dict(), load_weights(directory(run, 5), AVERAGED if averaged else WEIGHTS))
        assert told[kind]["loss_nats"] == pytest.approx(literal_loss(run, trained.model, 9), rel=1e-5)
    assert told["eval"]["loss_nats"] != told["averaged"]["loss_nats"]

    assert main(["eval", str(run), "--averaged"]) == 0
    assert "after 5 steps, averaged weights: validation of" in " ".join(capsys.readouterr().out.split())
    assert (run / "reports" / "eval-5-validation-documents-averaged.json").exists()
    assert main(["export", str(run), str(tmp_path / "out"), "--averaged"]) == 0
    from safetensors.torch import load_file

    exported = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in averages(run, 5).items():
        assert torch.equal(exported[f"model.{name}"], tensor)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "exponential average with decay 0.4" in card
    assert "± one standard error" in card  # the figures of the averaged weights

    without = go("without", until=1)
    assert main(["eval", str(without), "--averaged"]) == 2
    assert "has no averaged weights: train.average was not set when it was written" in capsys.readouterr().err


def literal_loss(run: Path, model: torch.nn.Module, sequences: int) -> float:
    """Return the loss of the first validation sequences, computed one at a time."""
    from bst_dist.train.objective import open_objective
    from bst_dist.train.rundir import read_recipe
    from data_pipeline.serve.loader import Loader
    from data_pipeline.serve.share import Share

    recipe = read_recipe(run)
    loader = Loader(
        recipe.data,
        open_objective(recipe).validation,
        Share(length=32, rows=1, micro_rows=1),
        block=recipe.model.block,
        seed=0,
    )
    found = []
    for row in range(sequences):
        (batch,) = loader.batches(row)
        with torch.no_grad():
            logits = model.logits(model.hidden(torch.from_numpy(batch.input_ids)))[0]
        found.append(torch.nn.functional.cross_entropy(logits, torch.from_numpy(batch.labels)[0]))
    return float(torch.stack(found).mean())


@pytest.mark.ranks
def test_every_rank_writes_its_part_of_the_averaged_weights(go, unmeasured):
    run = go("run", AVERAGE, world=2, until=1)
    files = sorted(directory(run, 1).glob("averaged-*.safetensors"))
    assert [path.name for path in files] == ["averaged-00000.safetensors", "averaged-00001.safetensors"]
    whole = sum(tensor.numel() for tensor in averages(run, 1).values())
    assert all(path.stat().st_size < 4 * whole for path in files)
    assert open_shards(directory(run, 1), AVERAGED).shapes == open_shards(directory(run, 1), WEIGHTS).shapes
