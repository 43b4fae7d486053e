"""From tables and a published tokenizer to a published model, using only commands."""

from __future__ import annotations

import base64
import inspect
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiktoken
import yaml
from transformers import AutoTokenizer

PATTERN = r"\s?\p{L}+|\p{N}{1,3}|\s?[^\s\p{L}\p{N}]+|\s+"
RANKS = {token: i for i, token in enumerate([*(bytes([b]) for b in range(256)), b"se", b"lf", b"self", b" r", b"in"])}
END = "<|endoftext|>"
TEXTS = [inspect.getsource(module) for module in (base64, inspect, json, pa, tiktoken, yaml)]


def run(bst, *arguments):
    done = bst(*arguments)
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.ranks
def test_parquet_and_tiktoken_data_survive_the_whole_chain(bst, tmp_path):
    (tmp_path / "tables").mkdir()
    for split, texts in (("train", TEXTS[1:]), ("validation", TEXTS[:1])):
        pq.write_table(pa.table({"text": texts}), tmp_path / f"tables/{split}-0.parquet")
    lines = (base64.b64encode(token) + f" {rank}\n".encode() for token, rank in RANKS.items())
    (tmp_path / "small.tiktoken").write_bytes(b"".join(lines))
    corpus = {
        "source": {"kind": "parquet", "path": "tables", "own_splits": True},
        "output": "corpus",
        "tokenizer": {
            "reuse": "small.tiktoken",
            "tiktoken": {"pat_str": PATTERN, "special_tokens": {END: len(RANKS)}},
        },
    }
    recipe = {
        "name": "chain",
        "ranks": 2,
        "model": {"width": 16, "depth": 1, "heads": 2, "ffn": 16, "block": 16, "mixer": "bst"},
        "data": {"corpus": "corpus"},
        "train": {"steps": 3, "sequence_length": 64, "sequences": 4, "micro_sequences": 2, "precision": "fp32"},
        "schedule": {"warmup_steps": 0},
        "evaluation": {"every": 0},
        "deepspeed": "zero1",
    }
    for name, settings in (("corpus", corpus), ("chain", recipe)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(settings))
    run(bst, "data", "prepare", "corpus.yaml")
    run(bst, "data", "verify", "corpus")
    assert "finished" in run(bst, "train", "chain.yaml")
    run(bst, "export", "runs/chain", "model")
    run(bst, "data", "export", "corpus", "again", "--format", "parquet")

    peer = tiktoken.Encoding("small", pat_str=PATTERN, mergeable_ranks=RANKS, special_tokens={END: len(RANKS)})
    published = AutoTokenizer.from_pretrained(tmp_path / "model", trust_remote_code=True)
    for text in TEXTS:
        assert published.encode(text, add_special_tokens=False) == peer.encode_ordinary(text)
    assert published.eos_token == END
    back = pq.read_table(tmp_path / "again", columns=["text"])["text"].to_pylist()
    assert sorted(back) == sorted(TEXTS)
