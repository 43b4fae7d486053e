from __future__ import annotations

import json

import pytest

from bst_dist.cli import main
from bst_dist.study.evaluation.trained import open_run
from bst_dist.study.lengths.measure import measure
from data_pipeline.serve.reader import Corpus


def test_report_and_table_contain_the_measured_losses(make_run, corpus, tmp_path, capsys):
    run_dir, out = make_run(), tmp_path / "report.json"
    assert main(["eval", str(run_dir), "--lengths", "128,8", "--json", str(out)]) == 0
    report = json.loads(out.read_text())
    (found,) = report["corpora"]
    assert [each["length_tokens"] for each in found["lengths"]] == [8, 32, 128]  # includes the trained length
    expected = measure(open_run(run_dir), Corpus.open(str(corpus), "validation"), [8, 32, 128])
    shown = capsys.readouterr().out
    for each, result in zip(found["lengths"], expected, strict=True):
        assert each["loss_nats_per_token"] == result.nats_per_token.value
        assert each["loss_over_trained_nats_per_token"] == result.versus_trained.value
        assert each["bits_per_byte_standard_error"] == result.bits_per_byte.standard_error
        assert each["positions"][-1]["last"] == each["length_tokens"]
        assert f"{result.nats_per_token}" in shown
    assert found["tokens"] == expected[0].tokens and found["tokens"] % 128 == 0
    assert "the documents joined to one stream" in shown


def test_number_of_long_enough_isolated_documents_is_printed(make_run, corpus, capsys):
    assert main(["eval", str(make_run(documents="isolated")), "--lengths", "128"]) == 0
    lengths = Corpus.open(str(corpus), "validation").lengths
    long = int((lengths > 128).sum())
    assert 0 < long < len(lengths)
    assert f"the {long} of {len(lengths)} documents that are that long" in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.parametrize(("documents", "length"), [("joined", 1 << 20), ("isolated", 1 << 12)])
def test_a_length_beyond_the_corpus_is_refused(make_run, capsys, documents, length):
    assert main(["eval", str(make_run(documents=documents)), "--lengths", str(length)]) == 2
    assert f"fewer than a length of {length:,}" in capsys.readouterr().err


def test_invalid_length_is_refused_before_reading(make_run, capsys, monkeypatch):
    run_dir = str(make_run())
    monkeypatch.setattr("bst_dist.study.lengths.command.measure", lambda *_, **__: pytest.fail("read"))
    assert main(["eval", run_dir, "--lengths", "12"]) == 2
    assert "length 12 is not a multiple of the model's block, 8" in capsys.readouterr().err


def test_a_run_without_a_checkpoint_is_refused(make_run, capsys):
    assert main(["eval", str(make_run(steps=())), "--lengths", "16"]) == 2
    assert "no valid checkpoint: the run has not reached its first one" in capsys.readouterr().err


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_token_ids_without_text_have_no_bits_per_byte(run_on_ids, tmp_path, capsys):
    path = tmp_path / "report.json"
    assert main(["eval", str(run_on_ids), "--lengths", "8,32", "--json", str(path)]) == 0
    (of,) = json.loads(path.read_text(), parse_constant=pytest.fail)["corpora"]
    assert [each[f"bits_per_byte{end}"] for each in of["lengths"] for end in ("", "_standard_error")] == [None] * 4
    assert not {"nan", "inf"} & set(capsys.readouterr().out.split())
