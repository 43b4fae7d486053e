from __future__ import annotations

import json

import pytest

from bst_dist.cli import main
from bst_dist.evaluate.decoding import printable


def generate(run_dir, *arguments):
    return main(["generate", str(run_dir), "--tokens", "30", *arguments])


@pytest.mark.parametrize("documents", ["joined", "isolated"])
def test_text_begins_with_the_prompt_and_is_what_the_report_says(make_run, documents, capsys, tmp_path):
    path = tmp_path / "report.json"
    assert generate(make_run(documents=documents), "--prompt", "naïve 😀", "--json", str(path)) == 0
    out, err = capsys.readouterr()
    report = json.loads(path.read_text())
    assert out.startswith("naïve 😀") and len(out) > len("naïve 😀")
    assert printable(report["text"]) + "\n" == out
    assert f"{report['tokens']} tokens" in err


def test_the_seed_decides_the_text(make_run, capsys):
    run_dir, texts = make_run(), []
    for seed in ("1", "1", "2"):
        assert generate(run_dir, "--seed", seed) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_a_model_of_isolated_documents_asks_for_a_prompt(make_run, capsys):
    assert generate(make_run(documents="isolated")) == 2
    assert "--prompt is empty" in capsys.readouterr().err


@pytest.mark.parametrize(("argument", "value"), [("--temperature", "-1"), ("--top-p", "0"), ("--tokens", "0")])
def test_settings_out_of_range_are_named(make_run, argument, value, capsys):
    assert generate(make_run(), argument, value) == 2
    assert argument.strip("-").replace("-", "_") in capsys.readouterr().err
