"""A run's data: passes counted before it starts, and corpora without a validation split."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from bst_base.errors import UserError
from bst_base.json_lines import read_lines
from bst_base.settings import parse
from bst_dist.cli import main
from bst_dist.parallel.mesh import Mesh
from bst_dist.report.metrics import FILE
from bst_dist.train.objective import LanguageModelling
from bst_dist.train.run import train
from bst_dist.train.start.request import Request, load, resolve
from data_pipeline.prepare.config import PrepareConfig
from data_pipeline.prepare.corpus import prepare
from data_pipeline.prepare.parallel import Workers
from data_pipeline.serve.config import DataConfig
from data_pipeline.serve.loader import open_corpora


@pytest.fixture(scope="module")
def unsplit(corpus, tmp_path_factory) -> Path:
    """A corpus of numbers with only a training split, in the other corpus's tokens."""
    place = tmp_path_factory.mktemp("unsplit")
    random = np.random.default_rng(1)
    (place / "texts").mkdir()
    for name in range(20):
        (place / f"texts/{name:02}.txt").write_text(" ".join(map(str, random.integers(0, 99, 200))))
    settings = {
        "source": {"kind": "folder", "path": str(place / "texts")},
        "output": str(place / "corpus"),
        "tokenizer": {"reuse": str(corpus)},
        "validation_fraction": 0,
    }
    prepare(parse(PrepareConfig, settings), Workers(None, 1), lambda *_: None)
    return place / "corpus"


def passes_of(corpus: Path, steps: int, rows: int, length: int) -> float:
    """Return the number of passes by the manifest: rows of `length` inputs; every token but the last is an input."""
    manifest = json.loads((corpus / "manifest.json").read_text())
    tokens = sum(shard["tokens"] for shard in manifest["splits"]["train"])
    return steps * rows / -(-(tokens - 1) // length)


@pytest.mark.ranks
def test_a_run_without_a_validation_split_reports_it_and_finishes(
    recipe_file, tmp_path, on_ranks, unmeasured, unsplit, capfd
):
    data = {"corpus": str(unsplit), "prefetch": 0, "documents": "masked", "packing": "best_fit"}
    recipe = recipe_file(data=data, log={"tensorboard": True})
    run = tmp_path / "run"
    assert on_ranks(2, lambda ranks: train(Request(recipe, [], run, False, None), ranks)) == [0, 0]
    said = capfd.readouterr().out
    assert said.count("no corpus has a validation split (prepare one with validation_fraction above 0)") == 1
    assert f"by step 6: {passes_of(unsplit, 6, 4, 32):.2f} passes over {unsplit}" in said
    assert said.count("\ndocs   masked, packing: best_fit\n") == 1
    lines = read_lines(run / FILE)
    assert {line["kind"] for line in lines} & {"eval", "corpus", "averaged"} == set()
    assert json.loads((run / "outcome.json").read_text())["finished"] is True


@pytest.mark.ranks
def test_only_corpora_with_a_validation_split_are_evaluated(
    recipe_file, tmp_path, on_ranks, unmeasured, unsplit, corpus
):
    """A mixture is evaluated on the corpus that has a split; a corpus without one, on the additional named corpora."""
    mixed = [{"corpus": str(unsplit), "weight": 3}, {"corpus": str(corpus), "weight": 1}]
    found = {}
    for name, data in [("alone", str(corpus)), ("mixed", mixed), ("named", str(unsplit))]:
        recipe = recipe_file(
            data={"corpus": data, "prefetch": 0},
            optimizer={"learning_rate": 1e-12},
            evaluation={"every": 3, "sequences": 4, "corpora": {"other": str(corpus)}},
        )
        on_ranks(1, lambda ranks, to: train(Request(to[0], [], to[1], False, None), ranks), (recipe, tmp_path / name))
        found[name] = [line for line in read_lines(tmp_path / name / FILE) if line["kind"] in ("eval", "corpus")]
        assert json.loads((tmp_path / name / "outcome.json").read_text())["finished"] is True
    assert [(line["kind"], line["step"]) for line in found["named"]] == [("corpus", 3), ("corpus", 6)]
    own = {name: [line["loss_nats"] for line in lines if line["kind"] == "eval"] for name, lines in found.items()}
    assert own["mixed"] == pytest.approx(own["alone"], rel=1e-5) and len(own["mixed"]) == 2


@pytest.mark.ranks
@pytest.mark.parametrize(("world", "changes"), [(1, ["train.slice_tokens=16"]), (2, ["parallel.sp=2"]), (3, [])])
def test_loss_of_each_corpus_in_a_mixture_equals_plain_torch(
    recipe_file, tmp_path, on_ranks, unmeasured, unsplit, corpus, world, changes
):
    mixed = [{"corpus": str(unsplit), "weight": 3}, {"corpus": str(corpus), "weight": 2}]
    recipe = recipe_file(
        data={"corpus": mixed, "prefetch": 0},
        train={"steps": 2, "sequences": 5},
        schedule={"warmup_steps": 0},
        optimizer={"learning_rate": 1e-12},
    )
    request = Request(recipe, ["train.micro_sequences=2", *changes], tmp_path / "run", False, None)
    on_ranks(world, lambda ranks: train(request, ranks))
    alone = Request(recipe, [], tmp_path / "none", False, None)
    start = resolve(load(alone), alone, 1)
    torch.manual_seed(start.recipe.seed)
    model = start.objective.model().double().eval()
    names = [str(unsplit), str(corpus)]  # the last parts of their paths are the same
    lines = [line for line in read_lines(tmp_path / "run" / FILE) if line["kind"] == "train"]
    for line, (_, batches) in zip(lines, start.objective.loader(Mesh(1, 0)), strict=False):
        nats, tokens = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0)
        for batch in batches:
            with torch.no_grad():
                logits = model.logits(model.hidden(torch.from_numpy(batch.input_ids)).float().double())
            found = cross_entropy(logits.transpose(1, 2), torch.from_numpy(batch.labels), reduction="none").numpy()
            for row, number in enumerate(batch.corpora.tolist()):
                nats[names[number]] += float(found[row][batch.loss_mask[row]].sum())
                tokens[names[number]] += int(batch.loss_mask[row].sum())
        assert line["tokens_by_corpus"] == tokens and all(tokens.values())
        assert line["loss_by_corpus"] == pytest.approx({name: nats[name] / tokens[name] for name in names}, rel=1e-5)
    assert len(lines) == 2


def test_evaluated_corpora_keep_their_mixture_weights():
    data = DataConfig(corpus=[{"corpus": name, "weight": weight} for name, weight in [("a", 0), ("b", 2), ("c", 1)]])
    assert [each.weight for each in data.only([False, True, True]).corpus] == [2, 1]
    assert [each.weight for each in data.only([True, False, False]).corpus] == [1]
    assert data.only([True] * 3) is data


@pytest.mark.ranks
def test_more_passes_than_allowed_are_refused_before_anything_is_written(
    recipe_file, tmp_path, on_ranks, unmeasured, corpus
):
    recipe = recipe_file(train={"steps": 2000, "sequence_length": 32, "sequences": 4, "precision": "fp32"})
    made = passes_of(corpus, 2000, 4, 32)

    def start(ranks):
        with pytest.raises(UserError, match=rf"{made:.2f} passes by step 2,000, more than data\.max_passes 1: take"):
            train(Request(recipe, ["data.max_passes=1"], tmp_path / "run", False, None), ranks)

    assert made > 1
    on_ranks(2, start)
    assert not (tmp_path / "run" / FILE).exists()


def test_the_plan_counts_passes_and_refuses_too_many(recipe_file, corpus, capsys, tmp_path):
    recipe = str(recipe_file())
    assert main(["plan", recipe]) == 0
    said = "".join(capsys.readouterr().out.split())
    assert f"bystep6:{passes_of(corpus, 6, 4, 32):.2f}passesover{corpus}" in said
    assert main(["plan", recipe, "data.max_passes=0.01"]) == 2
    assert "more than data.max_passes 0.01" in capsys.readouterr().err
    assert main(["plan", recipe, f"data.corpus={tmp_path / 'none'}", "model.vocab_size=320"]) == 0
    assert "passesnotcounted:" in "".join(capsys.readouterr().out.split())


def test_the_plan_shows_the_padding_of_isolated_documents(recipe_file, corpus, capsys):
    assert main(["plan", str(recipe_file()), "data.documents=isolated"]) == 0
    (opened,) = open_corpora(DataConfig(corpus=str(corpus)))
    padded = sum(-(-length // 8) * 8 for length in opened.lengths.tolist())
    said = f"({1 - int(opened.lengths.sum()) / padded:.0%} padding between isolated documents)"
    assert "".join(said.split()) in "".join(capsys.readouterr().out.split())


def test_passes_after_a_batch_change_include_rows_already_read(recipe_file, corpus):
    recipe = load(Request(recipe_file(), [], None, False, None))
    objective = LanguageModelling(recipe, open_corpora(recipe.data), [], {})
    state = objective.loader(Mesh(1, 0)).state_dict(2)
    more = recipe.model_copy(update={"train": recipe.train.model_copy(update={"sequences": 40})})
    told = LanguageModelling(more, objective.corpora, [], {}).reading(Mesh(1, 0), state, 6)
    assert told == f"by step 6: {passes_of(corpus, 1, 2 * 4 + 4 * 40, 32):.2f} passes over {corpus}"
