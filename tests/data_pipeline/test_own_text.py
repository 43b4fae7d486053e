"""From a folder of Parquet and a published tokenizer to a trained and exported model, using only commands."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tokenizers

from bst_base.settings import dump, parse
from bst_dist import cli
from bst_dist.config import Recipe


def published_tokenizer(texts: list[str]) -> tokenizers.Tokenizer:
    """Return a tokenizer like GPT-2's: byte-level, without a padding token."""
    published = tokenizers.Tokenizer(tokenizers.models.BPE())
    published.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    published.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>"],
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    published.train_from_iterator(texts, trainer)
    return published


@pytest.mark.ranks
@pytest.mark.parametrize("packing", ["stream", "best_fit"])
def test_training_and_export_from_parquet_with_a_published_tokenizer(tmp_path: Path, settings, packing: str) -> None:
    random = np.random.default_rng(0)
    words = ["for", "x", "in", "range", "(", ")", ":", "return", "naïve", "12", "+", "y", "if", "else"]
    texts = [" ".join(random.choice(words, 60 + 10 * i)) for i in range(40)]
    (tmp_path / "tables").mkdir()
    for part in range(2):
        table = pyarrow.table({"text": texts[part::2], "url": [f"https://{i}" for i in range(20)]})
        pyarrow.parquet.write_table(table, tmp_path / "tables" / f"{part}.parquet")
    published = published_tokenizer(texts)
    published.save(str(tmp_path / "tokenizer.json"))
    config = {
        "source": {"kind": "parquet", "path": str(tmp_path / "tables"), "keep": ["url"]},
        "output": str(tmp_path / "corpus"),
        "tokenizer": {"reuse": str(tmp_path / "tokenizer.json")},
        "validation_fraction": 0.2,
        "workers": 1,
    }
    (tmp_path / "corpus.yaml").write_text(json.dumps(config))
    assert cli.main(["data", "prepare", str(tmp_path / "corpus.yaml")]) == 0

    settings |= {"data": {"corpus": str(tmp_path / "corpus"), "packing": packing}}
    settings["train"] |= {"steps": 4}
    (tmp_path / "recipe.yaml").write_text(dump(parse(Recipe, settings)))
    assert cli.main(["train", str(tmp_path / "recipe.yaml"), "--run-dir", str(tmp_path / "run"), "--ranks", "1"]) == 0
    assert cli.main(["export", str(tmp_path / "run"), str(tmp_path / "model")]) == 0
    assert (tmp_path / "model" / "model.safetensors").is_file()

    exported = tmp_path / "exported"
    assert cli.main(["data", "export", str(tmp_path / "corpus"), str(exported), "--format", "parquet"]) == 0
    rows = [row for file in exported.glob("*.parquet") for row in pyarrow.parquet.read_table(file).to_pylist()]
    assert sorted(row["text"] for row in rows) == sorted(texts)
