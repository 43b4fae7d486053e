from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
import torch
import yaml

from bst_dist.cli import main
from bst_dist.study.evaluation.trained import open_run
from data_pipeline.serve.reader import Corpus


def literal_nats(run_dir, documents) -> list[float]:
    """Each document in one forward pass, padded behind, without any state carried over."""
    trained, nats = open_run(run_dir), []
    for tokens in documents:
        inputs = [trained.recipe.data.documents == "joined" and 3, *tokens[:-1].tolist()]
        padding = [0] * (-len(inputs) % 8)
        mask = torch.tensor([[True] * len(inputs) + [False] * len(padding)])
        labels = torch.tensor([tokens.tolist() + padding])
        nats.append(float(trained.model(torch.tensor([inputs + padding]), labels, mask).total.detach()))
    return nats


def test_reported_figures_are_those_of_whole_documents(make_run, corpus, tmp_path):
    run_dir, path = make_run(), tmp_path / "report.json"
    assert main(["eval", str(run_dir), "--json", str(path)]) == 0
    (report,) = json.loads(path.read_text())["corpora"]
    opened = Corpus.open(str(corpus), "validation")
    documents = [opened.document(i) for i in range(len(opened))]
    nats = literal_nats(run_dir, [d.astype(int) for d in documents])
    size = sum(len(opened.tokenizer().decode(d).encode()) for d in documents)
    tokens = sum(map(len, documents))
    assert report["documents"] == len(documents) > 3
    assert (report["tokens"], report["bytes"]) == (tokens, size)
    assert report["loss_nats_per_token"] == pytest.approx(sum(nats) / tokens, rel=1e-5)
    assert report["perplexity_per_token"] == pytest.approx(math.exp(sum(nats) / tokens), rel=1e-4)
    assert report["bits_per_byte"] == pytest.approx(sum(nats) / math.log(2) / size, rel=1e-5)
    words = sum(len(re.findall(r"\S+", opened.tokenizer().decode(d))) for d in documents)
    assert report["words"] == words
    assert report["perplexity_per_word"] == pytest.approx(math.exp(sum(nats) / words), rel=1e-4)
    assert 0 < report["bits_per_byte_standard_error"] < report["bits_per_byte"]


def test_the_first_token_of_an_isolated_document_is_a_uniform_guess(make_run, corpus, tmp_path):
    run_dir, path = make_run(documents="isolated"), tmp_path / "report.json"
    assert main(["eval", str(run_dir), "--json", str(path)]) == 0
    (report,) = json.loads(path.read_text())["corpora"]
    trained, opened = open_run(run_dir), Corpus.open(str(corpus), "validation")
    nats = 0.0
    for i in range(len(opened)):
        tokens = opened.document(i).astype(np.int64)
        inputs, labels = tokens[:-1], tokens[1:]
        padding = -len(inputs) % 8
        mask = torch.tensor([[True] * len(inputs) + [False] * padding])
        inputs, labels = (torch.from_numpy(np.pad(x, (0, padding)))[None] for x in (inputs, labels))
        starts = torch.zeros(1, inputs.shape[1] // 8, dtype=torch.bool)
        starts[0, 0] = True
        nats += math.log(320) + float(trained.model(inputs, labels, mask, starts).total.detach())
    assert report["loss_nats_per_token"] == pytest.approx(nats / report["tokens"], rel=1e-5)


def test_a_context_that_is_no_whole_blocks_is_refused(make_run, capsys):
    assert main(["eval", str(make_run()), "--context", "12"]) == 2
    assert "--context 12 is not a multiple of the model's block, 8" in capsys.readouterr().err


def test_less_context_makes_another_figure(make_run, tmp_path):
    run_dir = make_run()
    for context in ("8", "32"):
        assert main(["eval", str(run_dir), "--context", context, "--json", str(tmp_path / context)]) == 0
    short, long = (json.loads((tmp_path / c).read_text()) for c in ("8", "32"))
    assert (short["context_tokens"], long["context_tokens"]) == (8, 32)
    assert short["corpora"][0]["tokens"] == long["corpora"][0]["tokens"]
    assert short["corpora"][0]["loss_nats_per_token"] != long["corpora"][0]["loss_nats_per_token"]


def test_what_a_filter_sees_of_a_document_is_said(make_run, capsys):
    run_dir = make_run()
    assert main(["eval", str(run_dir)]) == 0
    assert "context the whole document; " in " ".join(capsys.readouterr().out.split())
    recipe = run_dir / "recipe.yaml"
    changed = yaml.safe_load(recipe.read_text())
    changed["model"]["ssm"] = {"kernel": "explicit", "length": 20}
    recipe.write_text(yaml.safe_dump(changed))
    assert main(["eval", str(run_dir), "--checkpoint", "0"]) == 0
    assert "the whole document, of which each filter sees the last 20 inputs" in " ".join(
        capsys.readouterr().out.split()
    )
