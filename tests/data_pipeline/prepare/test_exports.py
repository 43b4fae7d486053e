"""Token ids of other programs: prepared into corpora, served, and exported for these programs."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest

from bst_base.errors import UserError
from bst_base.settings import ConfigError, parse
from bst_dist import cli
from data_pipeline.format.manifest import Manifest
from data_pipeline.prepare.config import PrepareConfig
from data_pipeline.prepare.corpus import prepare
from data_pipeline.prepare.parallel import Workers
from data_pipeline.serve.reader import Corpus


def prepared(output: Path, **settings: Any) -> Manifest:
    return prepare(parse(PrepareConfig, {"output": str(output), **settings}), Workers(None, 1), lambda *_: None)[0]


def documents_of(corpus: Path) -> dict[str, list[int]]:
    """Return {path: ids without the end token} of all splits, as a run reads them."""
    found = {}
    for split, shards in Manifest.read(corpus).splits.items():
        if shards:
            own = Corpus.open(str(corpus), split)
            found |= {own.document_info(i)["path"]: own.document(i).tolist()[:-1] for i in range(len(own))}
    return found


def megatron_documents(prefix: Path) -> list[list[int]]:
    """Return the documents in a pair of Megatron-LM files, by their published format."""
    index, data = prefix.with_suffix(".idx").read_bytes(), prefix.with_suffix(".bin").read_bytes()
    assert index[:9] == b"MMIDIDX\x00\x00"
    version, code, sequences, bounds = struct.unpack_from("<QBQQ", index, 9)
    assert version == 1 and bounds == sequences + 1
    dtype = {8: np.dtype("<u2"), 4: np.dtype("<i4")}[code]
    lengths = struct.unpack_from(f"<{sequences}i", index, 34)
    begins = struct.unpack_from(f"<{sequences}q", index, 34 + 4 * sequences)
    assert list(struct.unpack_from(f"<{bounds}q", index, 34 + 12 * sequences)) == list(range(bounds))
    assert len(index) == 34 + 12 * sequences + 8 * bounds
    assert sum(lengths) * dtype.itemsize == len(data)
    return [np.frombuffer(data, dtype, count, begin).tolist() for begin, count in zip(begins, lengths, strict=True)]


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    """nanoGPT's train.bin and val.bin, with 40 and 4 documents; the first one twice."""
    rng = np.random.default_rng(0)
    for name, count in [("train", 40), ("val", 4)]:
        documents = [rng.integers(0, 99, rng.integers(8, 90)) for _ in range(count)]
        ids = np.concatenate([np.append(each, 99) for each in [*documents, documents[0]]])
        (tmp_path / "flat").mkdir(exist_ok=True)
        (tmp_path / f"flat/{name}.bin").write_bytes(ids.astype("<u2").tobytes())
    return tmp_path / "flat"


def source(path: Path, **more: Any) -> dict[str, Any]:
    return {"kind": "nanogpt", "path": str(path), "own_splits": True, "vocab_size": 100, "eos_id": 99, **more}


def test_token_ids_are_prepared_and_exported_back(flat: Path, tmp_path: Path, capsys) -> None:
    settings = [
        "source.kind=nanogpt",
        f"source.path={flat}",
        "source.own_splits=true",
        "source.vocab_size=100",
        "source.eos_id=99",
        f"output={tmp_path / 'corpus'}",
        "shard_bytes=4000",
    ]
    (tmp_path / "c.yaml").write_text("source: {kind: nanogpt}\n")
    assert cli.main(["data", "prepare", str(tmp_path / "c.yaml"), *settings, "workers=1"]) == 0
    assert cli.main(["data", "verify", str(tmp_path / "corpus"), "--workers", "1"]) == 0
    manifest = Manifest.read(tmp_path / "corpus")
    assert (manifest.dtype, manifest.tokenizer.vocab_size, manifest.tokenizer.eos_id) == ("uint16", 100, 99)
    assert manifest.provenance["duplicates"] == {"exact": 2, "near": 0}
    assert manifest.text_bytes("train") == 0 and len(manifest.splits["train"]) > 1
    wanted = {
        name: np.split(ids, np.flatnonzero(ids == 99) + 1)[:-2]
        for name in ("train", "val")
        for ids in [np.fromfile(flat / f"{name}.bin", "<u2")]
    }
    assert list(documents_of(tmp_path / "corpus").values()) == [e.tolist()[:-1] for es in wanted.values() for e in es]

    command = ["data", "export", str(tmp_path / "corpus"), str(tmp_path / "out"), "--format", "megatron"]
    assert cli.main([*command, "--workers", "1"]) == 0
    assert "train" in capsys.readouterr().out
    for split, name in [("train", "train"), ("validation", "val")]:
        assert megatron_documents(tmp_path / "out" / split) == [each.tolist() for each in wanted[name]]
    assert cli.main(command) == 2
    assert "out already exists; choose another folder" in capsys.readouterr().err

    back = source(tmp_path / "out") | {"kind": "megatron"}
    prepared(tmp_path / "back", source=back)
    assert list(documents_of(tmp_path / "back").values()) == list(documents_of(tmp_path / "corpus").values())
    path = next(iter(documents_of(tmp_path / "corpus")))
    assert cli.main(["data", "show", str(tmp_path / "corpus"), path]) == 0
    assert capsys.readouterr().out.split() == [str(i) for i in wanted["train"][0]]


def test_ids_with_their_tokenizer_give_the_same_corpus_as_text(run, folder: Path, tmp_path: Path) -> None:
    manifest, _ = run("prepared", validation_fraction=0.2)
    assert cli.main(["data", "export", str(tmp_path / "prepared"), str(tmp_path / "m"), "--format", "megatron"]) == 0
    source = {"kind": "megatron", "path": str(tmp_path / "m"), "own_splits": True}
    back = prepared(tmp_path / "back", source=source, tokenizer={"reuse": str(tmp_path / "prepared")})
    assert back.tokenizer == manifest.tokenizer
    for split in ("train", "validation"):
        assert (back.text_bytes(split), back.tokens(split)) == (manifest.text_bytes(split), manifest.tokens(split))
    assert list(documents_of(tmp_path / "back").values()) == list(documents_of(tmp_path / "prepared").values())


def test_parquet_export_contains_the_texts(run, folder: Path, tmp_path: Path, flat: Path) -> None:
    run("prepared", validation_fraction=0.2)
    assert cli.main(["data", "export", str(tmp_path / "prepared"), str(tmp_path / "p"), "--format", "parquet"]) == 0
    rows = pyarrow.parquet.read_table(tmp_path / "p").to_pylist()  # read the folder as users do
    own = tmp_path / "prepared/tokenizer.model"
    assert (tmp_path / "p/_tokenizer/tokenizer.model").read_bytes() == own.read_bytes()
    assert {row["path"]: row["text"].encode() for row in rows} == {
        str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*.txt")
    }
    reuse = {"reuse": str(tmp_path / "prepared")}
    source = {"kind": "parquet", "path": str(tmp_path / "p"), "own_splits": True}
    prepared(tmp_path / "back", source=source, tokenizer=reuse)
    assert sorted(documents_of(tmp_path / "back").values()) == sorted(documents_of(tmp_path / "prepared").values())

    prepared(tmp_path / "ids", source=globals()["source"](flat))
    assert cli.main(["data", "export", str(tmp_path / "ids"), str(tmp_path / "q"), "--format", "parquet"]) == 0
    rows = pyarrow.parquet.read_table(tmp_path / "q/train-00000-of-00001.parquet").to_pylist()
    found = documents_of(tmp_path / "ids")
    assert {row["path"]: row["input_ids"] for row in rows}.items() <= found.items() and len(rows) == 40


def test_a_damaged_shard_is_not_exported(flat: Path, tmp_path: Path, capsys) -> None:
    manifest = prepared(tmp_path / "corpus", source=source(flat))
    tar = tmp_path / "corpus" / manifest.splits["train"][0].file
    data = bytearray(tar.read_bytes())
    data[1700] ^= 1
    tar.write_bytes(data)
    for form in ("megatron", "parquet"):
        command = ["data", "export", str(tmp_path / "corpus"), str(tmp_path / "out"), "--format", form]
        assert cli.main([*command, "--workers", "1"]) == 2
        assert f"{tar}: not what was written" in capsys.readouterr().err.replace("\n", "")
        assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("form", ["megatron", "parquet"])
def test_export_with_another_tokenizer_is_refused(
    run, tmp_path: Path, tokenizer_model: bytes, capsys, form: str
) -> None:
    run()
    (tmp_path / "corpus/tokenizer.model").write_bytes(tokenizer_model)
    assert cli.main(["data", "export", str(tmp_path / "corpus"), str(tmp_path / "out"), "--format", form]) == 2
    assert "tokenizer.model: not the tokenizer that the corpus was made with" in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


def test_invalid_settings_for_token_ids_are_refused(flat: Path, tmp_path: Path, run, folder: Path) -> None:
    for settings, message in [
        ({"source": source(flat, eos_id=None)}, r"tokenizer\.reuse\), or else source\.vocab_size and source\.eos_id"),
        ({"source": source(flat), "text": {"undecodable": "skip"}}, "text: the source nanogpt holds tokens"),
        ({"source": source(flat), "tokenizer": {"reuse": "x"}}, r"source\.vocab_size: .* leave it out"),
    ]:
        with pytest.raises(ConfigError, match=message):
            parse(PrepareConfig, {"output": str(tmp_path / "corpus"), **settings})
    with pytest.raises(UserError, match=r"train\.bin:\d+: an id outside the vocabulary"):
        prepared(tmp_path / "corpus", source=source(flat, vocab_size=90, eos_id=89))
    prepared(tmp_path / "ids", source=source(flat))
    with pytest.raises(UserError, match="ids without a tokenizer cannot encode text"):
        run("prepared", tokenizer={"reuse": str(tmp_path / "ids")})


def test_interrupted_preparation_of_ids_continues(flat: Path, tmp_path: Path) -> None:
    settings = {"source": source(flat), "shard_bytes": 2000}
    prepared(tmp_path / "whole", **settings)

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "encode" and 0 < done < total:
            raise KeyboardInterrupt

    config = parse(PrepareConfig, {"output": str(tmp_path / "corpus"), **settings})
    with pytest.raises(KeyboardInterrupt):
        prepare(config, Workers(None, 1), stop)
    _, found = prepare(config, Workers(None, 1), lambda *_: None)
    assert found["shards_already_there"] > 0
    manifests = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("whole", "corpus")]
    assert manifests[0] == manifests[1]
