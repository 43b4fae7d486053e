from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from bst_dist.cli import main
from bst_dist.study.comparison.run_summary import eval_report
from bst_dist.study.evaluation import scoring
from bst_dist.study.evaluation.trained import open_run
from data_pipeline.serve.reader import Corpus

BST = Path(sys.executable).with_name("bst")


def literal_nats(run_dir, documents) -> list[float]:
    """Return the nats of each document, from one forward pass with padding at the end and no carried state."""
    trained, nats = open_run(run_dir), []
    for tokens in documents:
        inputs = [trained.recipe.data.documents == "joined" and 3, *tokens[:-1].tolist()]
        padding = [0] * (-len(inputs) % 8)
        mask = torch.tensor([[True] * len(inputs) + [False] * len(padding)])
        labels = torch.tensor([tokens.tolist() + padding])
        nats.append(float(trained.model(torch.tensor([inputs + padding]), labels, mask).total.detach()))
    return nats


def test_reported_figures_equal_those_of_whole_documents(make_run, corpus, tmp_path):
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


@pytest.mark.parametrize("documents", ["isolated", "masked"])
def test_isolated_and_masked_documents_are_scored_separately(make_run, corpus, tmp_path, documents):
    """The reference computes each document in a separate row, in double precision, with a uniform first token."""
    run_dir, path = make_run(documents=documents), tmp_path / "report.json"
    assert main(["eval", str(run_dir), "--json", str(path)]) == 0
    (report,) = json.loads(path.read_text())["corpora"]
    model, opened, nats = open_run(run_dir).model.double(), Corpus.open(str(corpus), "validation"), 0.0
    for i in range(len(opened)):
        tokens = opened.document(i).astype(np.int64)
        inputs, labels = tokens[:-1], tokens[1:]
        padding = -len(inputs) % 8
        mask = torch.tensor([[True] * len(inputs) + [False] * padding])
        inputs, labels = (torch.from_numpy(np.pad(x, (0, padding)))[None] for x in (inputs, labels))
        nats += math.log(320) + float(model(inputs, labels, mask).total.detach())
    assert report["loss_nats_per_token"] == pytest.approx(nats / report["tokens"], rel=1e-5)


def test_context_that_is_not_a_multiple_of_the_block_is_refused(make_run, capsys):
    assert main(["eval", str(make_run()), "--context", "12"]) == 2
    assert "--context 12 is not a multiple of the model's block, 8" in capsys.readouterr().err


def test_shorter_context_changes_the_loss(make_run, tmp_path):
    run_dir = make_run()
    for context in ("8", "32"):
        assert main(["eval", str(run_dir), "--context", context, "--json", str(tmp_path / context)]) == 0
    short, long = (json.loads((tmp_path / c).read_text()) for c in ("8", "32"))
    assert (short["context_tokens"], long["context_tokens"]) == (8, 32)
    assert short["corpora"][0]["tokens"] == long["corpora"][0]["tokens"]
    assert short["corpora"][0]["loss_nats_per_token"] != long["corpora"][0]["loss_nats_per_token"]


def test_eval_states_the_length_of_explicit_filters(make_run, capsys):
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


def test_batch_size_and_precision_are_used_and_reported(make_run, tmp_path, capsys):
    run_dir, found = make_run(), {}
    for options in ([], ["--batch-size", "1"], ["--precision", "bf16"]):
        assert main(["eval", str(run_dir), *options, "--json", str(tmp_path / "report.json")]) == 0
        report = json.loads((tmp_path / "report.json").read_text())
        found[" ".join(options)] = report["precision"], report["corpora"][0]["loss_nats_per_token"]
    (precision, loss), (_, single), (halved, rounded) = found.values()
    assert (precision, halved) == ("fp32", "bf16")
    assert single == pytest.approx(loss, rel=1e-6)
    assert 1e-6 < abs(rounded / loss - 1) < 1e-2
    assert {path.name for path in (run_dir / "reports").iterdir()} == {
        "eval-4-validation-documents.json",
        "eval-4-validation-documents-bf16.json",
    }
    assert main(["eval", str(run_dir), "--batch-size", "0"]) == 2
    assert "--batch-size 0: at least 1" in capsys.readouterr().err


def test_ctrl_c_reports_the_finished_documents(make_run, monkeypatch, capsys):
    run_dir = make_run()

    def forward(*args):
        if not told:
            told.append(os.kill(os.getpid(), signal.SIGINT))
        return real(*args)

    told, real = [], scoring._forward
    monkeypatch.setattr(scoring, "_forward", forward)
    assert main(["eval", str(run_dir), "--batch-size", "1", "--context", "4000"]) == 130
    assert "stopped before any document was finished" in capsys.readouterr().out
    told.clear()
    monkeypatch.setattr(scoring, "_forward", real)
    original = scoring._batches

    def batches(*args):
        for number, batch in enumerate(original(*args)):
            if number == 2:
                os.kill(os.getpid(), signal.SIGINT)
            yield batch

    monkeypatch.setattr(scoring, "_batches", batches)
    assert main(["eval", str(run_dir), "--batch-size", "1"]) == 130
    assert "stopped: only 2 of 7 documents, the longest first" in " ".join(capsys.readouterr().out.split())
    (path,) = (run_dir / "reports").glob("*-documents-part.json")
    report = json.loads(path.read_text())
    assert (report["passed"], report["corpora"][0]["documents"]) == (False, 2)
    assert eval_report(run_dir, 4) is None  # `bst compare` must not use a partial evaluation


@pytest.mark.ranks
def test_evaluation_does_not_depend_on_the_number_of_ranks(make_run, tmp_path):
    run_dir, found = make_run(), {}
    program = [str(BST), "eval", str(run_dir)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    torchrun = [str(BST.with_name("torchrun")), "--standalone", "--nproc-per-node", "2", "--no-python"]
    for name, command in {
        "one": program,
        "ranks": [*program, "--ranks", "3"],
        "torchrun": [*torchrun, *program],
    }.items():
        path = tmp_path / f"{name}.json"
        done = subprocess.run(
            [*command, "--json", str(path)], env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("perplexity per token") == 1
        found[name] = json.loads(path.read_text())
        assert (
            json.loads((run_dir / "reports" / "eval-4-validation-documents.json").read_text())["ranks"]
            == (found[name]["ranks"])
        )
    assert [report["ranks"] for report in found.values()] == [1, 3, 2]
    one = found["one"]["corpora"][0]
    for name in ("ranks", "torchrun"):
        other = found[name]["corpora"][0]
        assert (other["tokens"], other["bytes"], other["words"]) == (one["tokens"], one["bytes"], one["words"])
        assert other["document_nats"] == pytest.approx(one["document_nats"], rel=1e-5)


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_token_ids_without_text_have_neither_bytes_nor_words(run_on_ids, tmp_path, capsys):
    path = tmp_path / "report.json"
    assert main(["eval", str(run_on_ids), "--json", str(path)]) == 0
    report = json.loads(path.read_text(), parse_constant=pytest.fail)  # no NaN, no Infinity
    (of,) = report["corpora"]
    unknown = ("bits_per_byte", "perplexity_per_word")
    assert [of[f"{name}{end}"] for name in unknown for end in ("", "_standard_error")] == [None] * 4
    assert (of["bytes"], of["words"]) == (0, 0) and of["loss_nats_per_token"] > 1
    out = capsys.readouterr().out
    assert "perplexity per token" in out
    assert not re.search("bytes?|word|nan|inf", out.replace(str(run_on_ids), ""))
