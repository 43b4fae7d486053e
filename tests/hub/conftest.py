from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from bst_base.settings import dump, parse
from bst_dist.checkpoint.directory import FORMAT, MANIFEST, WEIGHTS, directory, shard_file
from bst_dist.cli import main
from bst_dist.config import Recipe
from bst_dist.model.lm import LanguageModel
from bst_dist.report.metrics import FILE
from bst_dist.train.rundir import RECIPE
from data_pipeline.format.tokenizer import Tokenizer, TokenizerConfig, parse_tokenizer, train_tokenizer

WORDS = ["naïve", "café", "for", "x", "=", "(", ")", "\n", "    ", "return", "é", "😀", "12", "class"]


@pytest.fixture(scope="session")
def sentencepiece_model() -> bytes:
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice(WORDS, 60)) for _ in range(30)]
    return train_tokenizer(texts, TokenizerConfig(vocab_size=320))


@pytest.fixture
def make_run(tmp_path, sentencepiece_model):
    """``make_run(…)`` makes a run directory with its own tokenizer and a checkpoint; no parameter is 0 or 1."""

    def make(name: str = "run", documents: str = "joined", tokenizer: Tokenizer | None = None, **changes) -> Path:
        tokenizer = tokenizer or parse_tokenizer(sentencepiece_model)
        settings = {
            "name": "small",
            "seed": 0,
            "train": {"steps": 9, "sequence_length": 32, "sequences": 2},
            "data": {"corpus": "none", "documents": documents, "storage": {"options": {"key": "$HIDDEN_KEY"}}},
            "model": {
                "vocab_size": 330,
                "width": 16,
                "heads": 2,
                "ffn": 24,
                "block": 8,
                "depth": 3,
                "mixer": "bst",
                "placement": [1, 2],
                "ssm": {"chunk": 4},
            }
            | changes,
        }
        recipe, run_dir = parse(Recipe, settings), tmp_path / name
        torch.manual_seed(0)
        model = LanguageModel(recipe.model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        write_checkpoint(directory(run_dir, 7), model)
        (run_dir / RECIPE).write_text(dump(recipe))
        (run_dir / tokenizer.file).write_bytes(tokenizer.model)
        line = {"kind": "eval", "split": "validation", "step": 7, "tokens": 99, "loss_nats": 2.5, "bits_per_byte": 3.5}
        (run_dir / FILE).write_text(json.dumps(line) + "\n")
        return run_dir

    return make


@pytest.fixture
def exported(make_run, tmp_path):
    """``exported(*options, **changes)`` makes a run and exports it; returns both directories."""

    def export(*options: str, **changes) -> tuple[Path, Path]:
        run_dir, folder = make_run(**changes), tmp_path / "exported"
        assert main(["export", str(run_dir), str(folder), *options]) == 0
        return run_dir, folder

    return export


def write_checkpoint(path: Path, model: LanguageModel) -> None:
    path.mkdir(parents=True)
    save_file(model.state_dict(), path / shard_file(WEIGHTS, 0))
    data = (path / shard_file(WEIGHTS, 0)).read_bytes()
    files = {shard_file(WEIGHTS, 0): {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "rank": 0}}
    about = {"format": FORMAT, "step": 7, "tokens": 448, "versions": {"torch": "0"}}
    (path / MANIFEST).write_text(json.dumps({**about, "files": files}))
