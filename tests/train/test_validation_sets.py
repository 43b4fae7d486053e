"""Validation on additional corpora: each loss and its error compared with plain torch, one sequence at a time."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from bst_base.errors import UserError
from bst_base.json_lines import read_lines
from bst_base.settings import parse
from bst_dist.checkpoint.directory import directory, read_manifest
from bst_dist.config import Recipe
from bst_dist.faults import signals, status
from bst_dist.report.metrics import FILE, CorpusReport
from bst_dist.report.writers import scalars
from bst_dist.train.run import train
from bst_dist.train.start.request import Request, load, resolve
from bst_dist.train.validation_sets import CorpusEvaluation, standard_error, with_corpus
from data_pipeline.prepare.config import PrepareConfig
from data_pipeline.prepare.corpus import prepare
from data_pipeline.prepare.parallel import open_workers
from data_pipeline.serve.loader import Loader, open_corpora
from data_pipeline.serve.share import Share


@pytest.fixture(scope="module")
def numbers(corpus, tmp_path_factory) -> Path:
    """Another corpus, of numbers, with the same tokenizer."""
    return prepared(tmp_path_factory.mktemp("numbers"), {"reuse": str(corpus)})


def prepared(place: Path, tokenizer: dict[str, Any]) -> Path:
    folder, output = place / "texts", place / "corpus"
    folder.mkdir()
    random = np.random.default_rng(1)
    for name in range(30):
        (folder / f"{name:02}.txt").write_text(" ".join(map(str, random.integers(0, 99, 40 + 9 * name))))
    settings = {
        "source": {"kind": "folder", "path": str(folder), "pattern": "*.txt"},
        "output": str(output),
        "tokenizer": tokenizer,
        "validation_fraction": 0.3,
    }
    with open_workers(1) as workers:
        prepare(parse(PrepareConfig, settings), workers, lambda *_: None)
    return output


def test_the_standard_error_equals_the_bootstrap_of_a_ratio():
    random = np.random.default_rng(0)
    nats, tokens = random.gamma(2.0, 30.0, 400), random.integers(5, 40, 400)
    again = [random.integers(0, 400, 400) for _ in range(4000)]  # the bootstrap gives the same figure independently
    spread = np.std([nats[draw].sum() / tokens[draw].sum() for draw in again])
    found = standard_error(torch.from_numpy(np.stack((nats, tokens), 1)))
    assert found == pytest.approx(spread, rel=0.05)
    alike = torch.tensor([[3.0, 4.0], [5.0, 4.0], [1.0, 4.0], [0.0, 0.0]])  # the last has no tokens
    assert standard_error(alike) == pytest.approx(np.std([0.75, 1.25, 0.25], ddof=1) / math.sqrt(3))
    assert math.isnan(standard_error(alike[:1]))


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("world", "changes"), [(1, []), (2, ["parallel.sp=2"]), (3, []), (1, ["train.slice_tokens=16"])]
)
def test_loss_of_each_validation_corpus_equals_plain_torch(
    recipe_file, tmp_path, on_ranks, unmeasured, numbers, corpus, world, changes
):
    sets = {"numbers": str(numbers), "again": str(corpus)}
    recipe = recipe_file(
        evaluation={"every": 1, "sequences": 7, "corpora": sets},
        optimizer={"learning_rate": 1e-12},
        checkpoint={"every": 1, "keep_best_on": "numbers"},
    )
    changes = ["train.micro_sequences=2", *changes]
    on_ranks(world, lambda ranks: train(Request(recipe, changes, tmp_path / "run", False, 1), ranks))
    lines = read_lines(tmp_path / "run" / FILE)
    found = {line["split"]: line for line in lines if line["kind"] == "corpus"}
    request = Request(recipe, [], tmp_path / "none", False, None)
    start = resolve(load(request), request, 1)
    for name, url in sets.items():
        losses = literal(start, url, 7)
        assert found[name]["tokens"] == 7 * 32
        assert found[name]["loss_nats"] == pytest.approx(losses.mean(), rel=1e-5)
        assert found[name]["loss_nats_standard_error"] == pytest.approx(losses.std(ddof=1) / math.sqrt(7), rel=1e-2)
    (own,) = [line for line in lines if line["kind"] == "eval"]
    assert found["again"]["loss_nats"] == pytest.approx(own["loss_nats"], rel=1e-6)
    assert found["again"]["bits_per_byte"] == pytest.approx(own["bits_per_byte"], rel=1e-6)
    manifest = read_manifest(directory(tmp_path / "run", 1))
    assert manifest["validation_loss_nats"] == found["numbers"]["loss_nats"]  # used by checkpoint.keep_best


@pytest.mark.ranks
def test_an_evaluation_that_is_stopped_before_its_last_set_is_repeated_whole(
    recipe_file, tmp_path, on_ranks, unmeasured, numbers
):
    sets = {"every": 6, "sequences": 3, "corpora": {"numbers": str(numbers)}}
    recipe, run_dir = recipe_file(train={"average": {}}, evaluation=sets), tmp_path / "run"

    def on_rank(ranks, resume: bool) -> int:
        notice, evaluate = signals.listen(), CorpusEvaluation.evaluate

        def stopped(self: CorpusEvaluation, step: int) -> CorpusReport | None:
            os.kill(os.getpid(), signal.SIGUSR1)
            assert notice.heard.wait(60)
            return evaluate(self, step)

        if not resume:
            CorpusEvaluation.evaluate = stopped  # in this rank's own process
        return train(Request(recipe, [], run_dir, resume, None), ranks, notice)

    def evaluated() -> list[tuple[str, str]]:
        return [(line["kind"], line["split"]) for line in read_lines(run_dir / FILE) if "split" in line]

    assert on_ranks(1, on_rank, False) == [status.RESUBMIT]
    assert not evaluated()
    assert on_ranks(1, on_rank, True) == [status.DONE]
    assert evaluated() == [("eval", "validation"), ("corpus", "numbers"), ("averaged", "validation")]


def literal(start, url: str, sequences: int) -> np.ndarray:
    """Return the untrained model's mean loss on each of the first validation sequences, in double precision."""
    recipe = start.recipe
    torch.manual_seed(recipe.seed)
    model, data = start.objective.model().double().eval(), with_corpus(recipe.data, url)  # served in shuffled mode
    loader = Loader(
        data, open_corpora(data, "validation"), Share(length=32, rows=1, micro_rows=1), block=recipe.model.block, seed=0
    )
    found = np.zeros(sequences)
    for row in range(sequences):
        (batch,) = loader.batches(row)
        with torch.no_grad():
            logits = model.logits(model.hidden(torch.from_numpy(batch.input_ids)).float().double())[0]
        found[row] = float(cross_entropy(logits, torch.from_numpy(batch.labels)[0]))
    return found


def test_a_corpus_that_is_missing_or_has_other_tokens_is_refused_before_ranks_start(recipe_file, tmp_path, numbers):
    other = prepared(tmp_path, {"vocab_size": 310})
    for path, said in (
        (tmp_path / "nowhere", "nowhere: no prepared corpus there"),
        (other, "evaluation.corpora.numbers: .* has another tokenizer than"),
    ):
        request = Request(
            recipe_file(evaluation={"corpora": {"numbers": str(path)}}), [], tmp_path / "run", False, None
        )
        with pytest.raises(UserError, match=said):
            resolve(load(request), request, 1)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"checkpoint": {"keep_best_on": "nubmers"}},
            "keep_best_on 'nubmers': not evaluated; choose validation or numbers",
        ),
        ({"evaluation": {"corpora": {"validation": "x"}}}, "evaluation.corpora"),
        ({"evaluation": {"corpora": {"a b": "x"}}}, "evaluation.corpora"),
    ],
)
def test_invalid_names_of_validation_corpora_are_refused(settings, changes, said):
    given = settings | {"evaluation": {"corpora": {"numbers": "x"}}} | changes
    with pytest.raises(UserError) as refused:
        parse(Recipe, given)
    assert said in str(refused.value)


def test_metrics_of_a_corpus_are_logged_under_its_own_name():
    report = CorpusReport(4, "numbers", 9, 2.0, 3.0, [], 0.5, loss_nats_standard_error=0.1)
    assert scalars(report)["validation numbers/loss_nats_standard_error"] == 0.1
    assert report.about() == "numbers (± 0.1000), 9 tokens"
