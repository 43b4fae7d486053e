"""The validation loss of a run equals that of plain torch on the same sequences, one row at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from bst_base.json_lines import read_lines
from bst_dist.report.metrics import FILE
from bst_dist.train.run import train
from bst_dist.train.start.request import Request, Start, load, resolve
from data_pipeline.serve.loader import Loader
from data_pipeline.serve.share import Share


def untrained(recipe: Path) -> Start:
    request = Request(recipe, [], recipe.parent / "none", False, None)
    return resolve(load(request), request, 1)


def literal(start: Start, sequences: int) -> tuple[int, float, list[float]]:
    """Return tokens, loss and loss by block of the untrained model on the first sequences, in double precision."""
    recipe = start.recipe
    torch.manual_seed(recipe.seed)
    model, block = start.objective.model().double().eval(), recipe.model.block
    share = Share(length=32, rows=1, micro_rows=1)
    loader = Loader(recipe.data, start.objective.validation, share, block=block, seed=0)
    nats = np.zeros((sequences, 32))
    for row in range(sequences):
        (batch,) = loader.batches(row)  # one row per step: the sequences of the split's first pass, in order
        with torch.no_grad():
            hidden = model.hidden(torch.from_numpy(batch.input_ids))
            logits = model.logits(hidden.float().double())[0]
        nats[row] = cross_entropy(logits, torch.from_numpy(batch.labels)[0], reduction="none").numpy()
        assert batch.loss_mask.all()
    return nats.size, nats.mean(), nats.reshape(sequences, -1, block).mean((0, 2)).tolist()


@pytest.mark.ranks
@pytest.mark.parametrize(("world", "sp", "sequences"), [(1, 1, 7), (2, 2, 7), (3, 1, 7), (3, 1, 2)])
def test_validation_loss_equals_plain_torch_over_all_micro_batches(
    recipe_file, tmp_path, on_ranks, unmeasured, world, sp, sequences
):
    """Three ranks do not divide seven sequences; with two sequences, one rank has none."""
    recipe = recipe_file(evaluation={"every": 1, "sequences": sequences}, optimizer={"learning_rate": 1e-12})
    changes = ["train.micro_sequences=2", f"parallel.sp={sp}"]
    on_ranks(world, lambda ranks: train(Request(recipe, changes, tmp_path / "run", False, 1), ranks))
    (line,) = [line for line in read_lines(tmp_path / "run" / FILE) if line["kind"] == "eval"]
    start = untrained(recipe)
    tokens, loss, by_block = literal(start, sequences)
    assert line["tokens"] == tokens == sequences * 32
    assert line["loss_nats"] == pytest.approx(loss, rel=1e-5)
    assert line["loss_by_block"] == pytest.approx(by_block, rel=1e-5)


@pytest.mark.ranks
def test_a_block_without_labels_has_no_loss(recipe_file, tmp_path, on_ranks, unmeasured):
    """Once its loss was 0, as of a perfect model. A document of 4 n + 1 tokens has no label in its last block."""
    recipe = recipe_file(
        model={"block": 4},
        data={"documents": "isolated"},
        evaluation={"every": 1, "sequences": 1},
        train={"sequence_length": 2048, "sequences": 1},
    )
    on_ranks(1, lambda ranks: train(Request(recipe, [], tmp_path / "run", False, 1), ranks))
    (line,) = [line for line in read_lines(tmp_path / "run" / FILE) if line["kind"] == "eval"]
    start, share = untrained(recipe), Share(length=2048, rows=1, micro_rows=1)
    (batch,) = Loader(start.recipe.data, start.objective.validation, share, block=4, seed=0).batches(0)
    losses, labels = np.array(line["loss_by_block"]), batch.loss_mask.reshape(-1, 4).sum(1)
    assert np.isnan(losses).tolist() == (labels == 0).tolist()
    assert 0 < (labels == 0).sum() < len(labels)
    assert np.nansum(losses * labels) / labels.sum() == pytest.approx(line["loss_nats"])


@pytest.mark.ranks
def test_evaluating_more_than_the_split_counts_each_token_once(recipe_file, tmp_path, on_ranks, unmeasured, capfd):
    recipe = recipe_file(evaluation={"every": 1, "sequences": 5000})
    on_ranks(2, lambda ranks: train(Request(recipe, [], tmp_path / "run", False, 1), ranks))
    (line,) = [line for line in read_lines(tmp_path / "run" / FILE) if line["kind"] == "eval"]
    start = untrained(recipe)
    (corpus,) = start.objective.validation
    held = int(corpus.lengths.sum()) - 1  # every token except the first is predicted
    assert line["tokens"] == held
    sequences = -(-held // 32)
    assert (
        f"the validation split holds {sequences:,} sequences; evaluation.sequences asks for 5,000"
        in capfd.readouterr().out
    )
