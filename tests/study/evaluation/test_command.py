from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from bst_base import files
from bst_dist.cli import main
from bst_dist.study.comparison.run_summary import eval_report
from data_pipeline.serve.reader import Corpus


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--lengths", "8", "--harness", "x"], "--lengths and --harness are separate evaluations"),
        (["--plot", "x.png"], "--plot does not apply to this evaluation, only to --lengths"),
        (["--lengths", "8", "--context", "8"], "--context does not apply to this evaluation, only to whole documents"),
        (["--harness", "x", "--tokens", "9"], "--tokens does not apply to this evaluation, only to --lengths"),
        (["--harness-tasks", "x"], "--harness-tasks does not apply to this evaluation, only to --harness"),
    ],
)
def test_options_of_another_evaluation_are_refused(make_run, capsys, options, reason):
    assert main(["eval", str(make_run()), *options]) == 2
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--rows=0", "--rows=-3", "--length=0", "--limit=0", "--limit=-1", "--fewshot=-1"])
def test_numbers_out_of_range_are_refused(make_run, capsys, option):
    with pytest.raises(SystemExit):
        main(["eval", str(make_run()), "--needle", option])
    name, _, value = option.partition("=")
    assert f"argument {name}: {value} is less than {0 if name == '--fewshot' else 1}" in capsys.readouterr().err


def test_invalid_list_of_lengths_is_refused(make_run, capsys):
    with pytest.raises(SystemExit):
        main(["eval", str(make_run()), "--lengths", "8,x"])
    assert "'8,x' is not a list of lengths like 512,4096" in capsys.readouterr().err


def test_each_kind_of_evaluation_keeps_its_own_report(make_run, corpus):
    run_dir = make_run()
    for options in ([], [], ["--context", "8"], ["--lengths", "8,16"], ["--corpus", str(corpus)]):
        assert main(["eval", str(run_dir), *options]) == 0
    kept = {path.name: json.loads(path.read_text()) for path in (run_dir / "reports").iterdir()}
    names = ["documents", "documents-context-8", f"documents-{corpus.name}", "lengths"]
    assert kept.keys() == {f"eval-4-validation-{name}.json" for name in names}
    assert eval_report(run_dir, 4)["corpora"] == kept[f"eval-4-validation-documents-{corpus.name}.json"]["corpora"]
    assert eval_report(run_dir, 4)["corpora"][0]["sha256"] == Corpus.open(str(corpus), "validation").sha256
    assert kept["eval-4-validation-documents-context-8.json"]["context_tokens"] == 8


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_report_that_the_run_cannot_keep_is_still_written_elsewhere(make_run, tmp_path, monkeypatch, capsys, number):
    run_dir, sync = make_run(), os.fsync

    def refusing(descriptor):
        if Path(f"/proc/self/fd/{descriptor}").readlink().is_relative_to(run_dir / "reports"):
            raise OSError(number, os.strerror(number))
        sync(descriptor)

    monkeypatch.setattr(files.os, "fsync", refusing)
    assert main(["eval", str(run_dir), "--json", str(tmp_path / "eval.json")]) == 0
    assert json.loads((tmp_path / "eval.json").read_text())["corpora"]
    assert not any((run_dir / "reports").iterdir())
    assert "the report was not kept in the run; --json writes it elsewhere: " in (said := capsys.readouterr().out)
    assert str(run_dir / "reports" / "eval-4-validation-documents.json") in said
