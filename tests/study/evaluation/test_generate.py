from __future__ import annotations

import io
import json

import pytest

from bst_base.errors import UserError
from bst_dist.cli import main
from bst_dist.generation.text_stream import printable
from bst_dist.study.evaluation import generate as command
from bst_dist.study.evaluation.prompts import Prompt, encode
from bst_dist.study.evaluation.trained import open_run
from data_pipeline.format.tokenizer import IdsOnly


def generate(run_dir, *arguments):
    return main(["generate", str(run_dir), "--tokens", "30", *map(str, arguments)])


@pytest.mark.parametrize("documents", ["joined", "isolated"])
def test_printed_text_is_the_prompt_and_the_reported_continuation(make_run, documents, capsys, tmp_path):
    path = tmp_path / "report.json"
    assert generate(make_run(documents=documents), "--prompt", "naïve 😀", "--json", path) == 0
    out, err = capsys.readouterr()
    (text,) = json.loads(path.read_text())["texts"]
    assert text["continuation"]
    assert printable("naïve 😀" + text["continuation"]) + "\n" == out
    assert f"{text['tokens']} tokens" in err


def test_generated_text_depends_on_the_seed(make_run, capsys):
    run_dir, texts = make_run(), []
    for seed in ("1", "1", "2"):
        assert generate(run_dir, "--seed", seed) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("p.txt", ["for x", "", "return 12"]),
        ("p.jsonl", ['"for x"', '{"prompt": "return 12", "id": 7}']),
    ],
)
def test_prompts_give_one_json_line_per_sample_for_any_batch_size(make_run, name, lines, capsys, tmp_path):
    run_dir, path, found = make_run(), tmp_path / name, []
    path.write_text("\n".join(lines))
    for batch in (1, 3, 32):
        assert generate(run_dir, "--prompts", path, "--samples", 2, "--batch", batch) == 0
        found.append([json.loads(line) for line in capsys.readouterr().out.splitlines()])
    assert found[0] == found[1] == found[2]
    assert [(text["prompt"], text["sample"]) for text in found[0]] == [
        ("for x", 0),
        ("for x", 1),
        ("return 12", 0),
        ("return 12", 1),
    ]
    generate(run_dir, "--prompt", "for x")  # the first sample of the first prompt
    assert capsys.readouterr().out == printable("for x" + found[0][0]["continuation"]) + "\n"


def test_text_ends_at_a_stop_text_or_a_stop_token(make_run, tmp_path):
    run_dir, path = make_run(), tmp_path / "report.json"

    def written(*arguments):
        assert generate(run_dir, "--prompt", "x", "--json", path, *arguments) == 0
        return json.loads(path.read_text())["texts"][0]

    whole = written()
    assert whole["ended_by"] == "number of tokens"
    stop = whole["continuation"][5:8]
    stopped = written("--stop", "never there", "--stop", stop)
    assert stopped["ended_by"] == "stop text"
    assert stopped["continuation"] == whole["continuation"][: whole["continuation"].find(stop)]
    every = [argument for token in range(320) for argument in ("--stop-token", token)]
    assert written(*every)["tokens"] == 1


def test_model_of_isolated_documents_needs_a_prompt(make_run, capsys):
    assert generate(make_run(documents="isolated")) == 2
    assert "--prompt is empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argument", "value"),
    [("--temperature", "-1"), ("--top-p", "0"), ("--tokens", "0"), ("--samples", "0"), ("--min-p", "2")],
)
def test_settings_out_of_range_are_named(make_run, argument, value, capsys):
    assert generate(make_run(), argument, value) == 2
    assert argument.strip("-").replace("-", "_") in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no prompt: write one per line"),
        (b"{}", "line 1: expected a string"),
        (b'"a"\n[', "line 2: not JSON"),
        (b"\xff", "cannot be read"),
    ],
)
def test_invalid_prompt_files_are_refused(make_run, content, message, tmp_path, capsys):
    path = tmp_path / "p.jsonl"
    path.write_bytes(content)
    assert generate(make_run(), "--prompts", path) == 2
    assert message in capsys.readouterr().err


def test_prompt_that_is_not_unicode_is_refused(make_run, capsys):
    assert generate(make_run(), "--prompt", "ab\udcff") == 2
    assert "--prompt is not Unicode text (character 2 is '\\udcff')" in capsys.readouterr().err


def test_a_run_without_a_checkpoint_is_refused(make_run, capsys):
    assert generate(make_run(steps=())) == 2
    assert "no valid checkpoint" in capsys.readouterr().err


def test_prompts_are_read_from_standard_input(make_run, capsys, monkeypatch, tmp_path):
    run_dir, path = make_run(), tmp_path / "p.txt"
    path.write_text("for x\nreturn 12\n")
    assert generate(run_dir, "--prompts", path) == 0
    expected = capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.StringIO("for x\nreturn 12\n"))
    assert generate(run_dir, "--prompts", "-") == 0
    assert capsys.readouterr().out == expected


def test_interactive_mode_continues_each_line_with_one_model_load(make_run, capsys, monkeypatch):
    run_dir, opened = make_run(), []
    for prompt in ("for x", "return 12"):
        assert generate(run_dir, "--prompt", prompt) == 0
    expected = capsys.readouterr().out
    monkeypatch.setattr(command, "open_run", lambda *args: opened.append(args) or open_run(*args))
    monkeypatch.setattr("sys.stdin", io.StringIO("for x\nreturn 12\n\nnot read\n"))
    assert generate(run_dir, "--interactive") == 0
    assert capsys.readouterr().out == expected
    assert len(opened) == 1


def test_a_model_of_token_ids_continues_ids(run_on_ids, capsys, tmp_path):
    path = tmp_path / "report.json"
    for prompt in ("", "5 6 7"):
        assert generate(run_on_ids, "--prompt", prompt, "--json", path) == 0
        (text,) = json.loads(path.read_text())["texts"]
        ids = [int(word) for word in text["continuation"].split()]
        assert len(ids) == text["tokens"] - (text["ended_by"] == "end of the document") > 0
        assert capsys.readouterr().out == f"{prompt}{text['continuation']}\n"
    stop = " ".join(map(str, ids[2:4]))
    assert generate(run_on_ids, "--prompt", prompt, "--stop", f" {stop} ", "--json", path) == 0
    assert json.loads(path.read_text())["texts"][0]["continuation"] == "".join(f" {token}" for token in ids[:2])


@pytest.mark.parametrize("prompt", ["class", "5 6.0", "5 320", "-1"])
def test_a_prompt_for_a_model_of_token_ids_has_to_be_ids(run_on_ids, capsys, prompt):
    assert generate(run_on_ids, f"--prompt={prompt}") == 2
    assert "write ids from 0 to 319, separated by spaces" in capsys.readouterr().err


def test_a_model_of_isolated_ids_needs_a_prompt(make_run):
    recipe = open_run(make_run(documents="isolated")).recipe
    assert encode(recipe, IdsOnly.of(320, 1), Prompt("5 6", "here")) == [5, 6]
    with pytest.raises(UserError, match="here is empty"):
        encode(recipe, IdsOnly.of(320, 1), Prompt(" ", "here"))
