"""`bst export` and `bst import` as a user runs them."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import bst_dist.hub
from bst_base.errors import UserError
from bst_dist.cli import main
from bst_dist.config import load_recipe
from bst_dist.study.evaluation.trained import open_run, tokenizer_of
from bst_dist.train.start import directory
from data_pipeline.format.tokenizer import (
    IdsOnly,
    TokenizerConfig,
    adopt_tokenizer,
    parse_tokenizer,
    train_tokenizer,
)


def equal(one, other):
    """Whether two runs have the same weights."""
    a, b = open_run(one).model.state_dict(), open_run(other).model.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_an_exported_run_is_restored_by_import(exported, tmp_path):
    run_dir, folder = exported()
    assert main(["import", str(folder), str(tmp_path / "back"), "data.corpus=elsewhere"]) == 0
    assert equal(run_dir, tmp_path / "back")
    there, back = (load_recipe(path / "recipe.yaml") for path in (run_dir, tmp_path / "back"))
    assert (back.model, back.train, back.data.corpus) == (there.model, there.train, str(Path("elsewhere").absolute()))
    assert open_run(tmp_path / "back").step == 7
    assert tokenizer_of(tmp_path / "back", back).model == tokenizer_of(run_dir, there).model
    for command in ("ls", "show", "verify"):
        assert main(["ckpt", command, str(tmp_path / "back")]) == 0


@pytest.mark.ranks
def test_a_run_of_two_ranks_is_imported_evaluated_and_trained_from(recipe_file, tmp_path, capfd):
    """The run's checkpoint has an index over two files; the imported checkpoint is a single file."""
    recipe, there, back = str(recipe_file()), tmp_path / "there", tmp_path / "back"
    assert main(["train", recipe, "--run-dir", str(there), "--ranks", "2", "--until", "3"]) == 0
    assert main(["export", str(there), str(tmp_path / "model")]) == 0
    assert main(["import", str(tmp_path / "model"), str(back)]) == 0
    assert equal(there, back)
    for run_dir in (there, back):
        assert main(["eval", str(run_dir), "--json", str(run_dir / "eval.json")]) == 0
    found = [json.loads((run_dir / "eval.json").read_text())["corpora"][0] for run_dir in (there, back)]
    assert found[0]["document_nats"] == found[1]["document_nats"]
    assert main(["export", str(back), str(tmp_path / "again")]) == 0
    assert main(["ckpt", "convert", str(back), str(tmp_path / "plain")]) == 0
    begin = [f"initial_weights.run={back}", "initial_weights.step=3", "train.steps=3"]
    assert main(["train", recipe, *begin, "--run-dir", str(tmp_path / "next"), "--ranks", "2"]) == 0


def test_a_published_tokenizer_survives_export_and_import(make_run, tmp_path):
    """The export contains the corpus's tokenizer, and its form for transformers, which adds no end token to a text."""
    folder = tmp_path / "exported"
    published = tokenizers.Tokenizer(tokenizers.models.BPE())
    published.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    published.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    published.train_from_iterator(
        ["for x = 12 return"] * 9,
        tokenizers.trainers.BpeTrainer(
            vocab_size=280,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    published.save(str(tmp_path / "tokenizer.json"))
    ours = adopt_tokenizer(tmp_path / "tokenizer.json", TokenizerConfig())
    assert main(["export", str(make_run(tokenizer=ours)), str(folder)]) == 0
    theirs = AutoTokenizer.from_pretrained(folder)
    for text in ("for x = 12", "naïve <|endoftext|>\n\n 😀"):
        assert theirs(text).input_ids == [ours.eos_id, *ours.encode(text)]
        assert theirs.decode(theirs(text).input_ids, skip_special_tokens=True) == text
    assert main(["import", str(folder), str(tmp_path / "back")]) == 0
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == ours.model


def test_a_run_on_token_ids_survives_export_and_import(exported, tmp_path):
    ids = IdsOnly.of(330, 1)
    run_dir, folder = exported(tokenizer=ids)
    assert main(["import", str(folder), str(tmp_path / "back")]) == 0
    assert equal(run_dir, tmp_path / "back")
    assert (tmp_path / "back" / ids.file).read_bytes() == ids.model


def unigram():
    texts = [f"a few words of text {i * 7919}, and a few more words: naïve, café, return" for i in range(400)]
    return parse_tokenizer(train_tokenizer(texts, TokenizerConfig(vocab_size=300, model_type="unigram")))


@pytest.mark.parametrize(
    ("kind", "documents"),
    [
        ("bpe", "joined"),
        ("unigram", "joined"),
        ("ids", "joined"),
        ("ids", "isolated"),
    ],
)
def test_the_code_of_the_model_card_runs(exported, tmp_path, kind, documents):
    tokenizer = {"bpe": lambda: None, "unigram": unigram, "ids": lambda: IdsOnly.of(330, 1)}[kind]()
    _, folder = exported(tokenizer=tokenizer, documents=documents)
    card = (folder / "README.md").read_text()
    code = card.split("```python")[1].split("```")[0].replace("DIRECTORY", repr(str(folder)))
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()
    assert ("okenizer" in card.split("## Training")[0]) == (kind != "ids")
    if kind == "ids":
        assert done.stdout.startswith("[1, " if documents == "joined" else "[0, ")


@pytest.mark.parametrize("resume", [True, False])
def test_training_in_an_imported_directory_is_refused(exported, tmp_path, resume):
    _, folder = exported()
    assert main(["import", str(folder), str(tmp_path / "back")]) == 0
    recipe = load_recipe(tmp_path / "back" / "recipe.yaml")
    with pytest.raises(UserError, match=r"initial_weights\.step=7"):
        directory.check(tmp_path / "back", recipe, {}, resume=resume)


def test_a_model_saved_by_transformers_can_be_imported(exported, tmp_path):
    run_dir, folder = exported()
    model = AutoModelForCausalLM.from_pretrained(folder)
    bst_dist.hub.BSTTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    model.save_pretrained(tmp_path / "saved", max_shard_size="20KB")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 1
    assert main(["import", str(tmp_path / "saved"), str(tmp_path / "back")]) == 0
    assert equal(run_dir, tmp_path / "back")


def test_several_half_precision_files_load_as_one_model(exported, tmp_path):
    run_dir, folder = exported("--dtype", "bf16", "--file-size", "20000")
    assert len(list(folder.glob("*.safetensors"))) > 1
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    for name, weight in open_run(run_dir).model.state_dict().items():
        got = model.model.state_dict()[name]
        kept = name.rpartition(".")[2] in ("log_dt", "log_decay", "frequency")
        assert torch.equal(got, weight if kept else weight.bfloat16().float()), name
    assert main(["import", str(folder), str(tmp_path / "back")]) == 0


def test_the_model_card_shows_run_facts_and_no_secret(exported):
    _, folder = exported()
    card = (folder / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "transformers"
    assert "| validation, 99 tokens in sequences as in training | 2.5000 | 3.5000 |" in card
    assert "7 of 9 steps on 448 tokens" in card
    assert not [path for path in folder.iterdir() if b"HIDDEN_KEY" in path.read_bytes()]


def test_the_model_card_shows_figures_with_standard_errors(make_run, tmp_path):
    figures = {
        "loss_nats_per_token": 2.0,
        "loss_nats_per_token_standard_error": 0.25,
        "bits_per_byte": 3.0,
        "bits_per_byte_standard_error": None,
        "corpus": "/data/prose",
        "documents": 12,
    }
    report, run_dir = {"command": "bst eval", "split": "validation", "context_tokens": None}, make_run()
    (run_dir / "reports").mkdir()
    for step, loss in ((6, 9.0), (7, 2.0)):
        whole = report | {"step": step, "corpora": [figures | {"loss_nats_per_token": loss}]}
        (run_dir / "reports" / f"{step}.json").write_text(json.dumps(whole))
    assert main(["export", str(run_dir), str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| validation of prose, 12 documents | 2.0000 ± 0.2500 | 3.0000 |" in card


@pytest.mark.parametrize("unknown", [None, math.nan])
def test_the_model_card_shows_no_bits_per_byte_of_token_ids(make_run, tmp_path, unknown):
    run_dir = make_run(tokenizer=IdsOnly.of(330, 1))
    line = {"kind": "eval", "split": "test", "step": 7, "tokens": 9, "loss_nats": 2.5, "bits_per_byte": unknown}
    (run_dir / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    assert main(["export", str(run_dir), str(tmp_path / "out")]) == 0
    assert "in training | 2.5000 |  |\n" in (tmp_path / "out" / "README.md").read_text()


def test_digests_can_be_checked_by_sha256sum(exported):
    _, folder = exported()
    assert subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=folder, check=False).returncode == 0
    assert len((folder / "SHA256SUMS").read_text().splitlines()) == len(list(folder.iterdir())) - 1


def flip(folder):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def drop(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file({name: t for name, t in tensors.items() if name != "model.norm.weight"}, folder / "model.safetensors")


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def change(**changes):
    def edit(folder):
        config = json.loads((folder / "config.json").read_text())
        for key, value in changes.items():
            *parents, leaf = key.split("__")
            node = config
            for parent in parents:
                node = node[parent]
            node[leaf] = value
        (folder / "config.json").write_text(json.dumps(config))

    return edit


@pytest.mark.parametrize(
    ("damage", "said", "loading"),
    [
        (cut, "damaged: .*copy the model again", None),
        (drop, "model.norm.weight is missing, .* wants \\(16,\\)", "1 weights are missing, model.norm.weight"),
        (change(recipe__model__ffn=32), "ffn.out.weight is \\(16, 24\\), .* wants \\(16, 32\\)", "of another shape"),
        (change(recipe__model__depth=2, recipe__model__placement=[1]), "wants no such tensor", "not of this model"),
        (
            change(recipe__model__widht=16),
            "unknown key 'model.widht': did you mean 'model.width'",
            "unknown key 'widht'",
        ),
        (change(frobnicate=1), "unknown key 'frobnicate'", None),
        (change(model_type="gpt2"), "not of a model that `bst export` wrote", None),
        (lambda folder: (folder / "tokenizer.model").unlink(), "tokenizer is missing", None),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors", None),
    ],
)
def test_a_damaged_export_is_refused_in_one_message(exported, tmp_path, capsys, damage, said, loading):
    _, folder = exported()
    (folder / "SHA256SUMS").unlink()
    damage(folder)
    capsys.readouterr()
    assert main(["import", str(folder), str(tmp_path / "back")]) == 2
    assert re.search(said, capsys.readouterr().err)
    assert not (tmp_path / "back").exists()
    if loading:
        with pytest.raises(UserError, match=loading):
            AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (flip, "changed since the export"),
        (lambda folder: (folder / "hub_modeling.py").unlink(), "hub_modeling.py is missing"),
    ],
)
def test_a_changed_file_of_an_export_is_named(exported, tmp_path, capsys, damage, said):
    _, folder = exported()
    damage(folder)
    assert main(["import", str(folder), str(tmp_path / "back")]) == 2
    assert said in capsys.readouterr().err


def test_existing_directories_and_runs_without_a_checkpoint_are_refused(exported, make_run, tmp_path, capsys):
    run_dir, folder = exported()
    assert main(["export", str(run_dir), str(folder)]) == 2
    assert main(["import", str(folder), str(run_dir)]) == 2
    shutil.rmtree(run_dir / "checkpoints")
    capsys.readouterr()
    assert main(["export", str(run_dir), str(tmp_path / "other")]) == 2
    assert "no checkpoint" in capsys.readouterr().err


def test_without_transformers_the_message_says_how_to_install_it():
    code = "import sys; sys.modules['transformers'] = None; from bst_dist.cli import main; sys.exit(main(['export']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "bst export: transformers is not installed: pip install" in done.stderr
