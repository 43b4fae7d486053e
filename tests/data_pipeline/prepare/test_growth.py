"""A corpus that continues an earlier one has the same content as a new one, and keeps all files of the earlier one."""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from bst_base.errors import UserError
from bst_base.settings import parse
from data_pipeline.commands import verify
from data_pipeline.format.manifest import Manifest
from data_pipeline.prepare.assemble import assign, deduplicate
from data_pipeline.prepare.dedup import DedupConfig
from data_pipeline.prepare.growth import Earlier
from data_pipeline.prepare.spool import SPLITS, TABLE
from data_pipeline.serve.config import DataConfig
from data_pipeline.serve.loader import Loader, open_corpora
from data_pipeline.serve.share import Share
from tests.data_pipeline.prepare.conftest import text
from tests.data_pipeline.prepare.test_prepare import stored


def grow(folder: Path) -> None:
    """Add twelve new texts between the old ones, a copy of an old one, and a near duplicate of an old one."""
    for i in range(30, 42):
        (folder / "ab"[i % 2] / f"0{i}.txt").write_bytes(text(i).encode())
    (folder / "a" / "0-again.txt").write_bytes((folder / "b" / "01.txt").read_bytes())
    (folder / "a" / "0-nearly.txt").write_bytes((folder / "b" / "03.txt").read_bytes() + b" and the end")


def grown(run: Any, folder: Path, tmp_path: Path) -> Manifest:
    run()
    grow(folder)
    return run("grown", continues=str(tmp_path / "corpus"))[0]


def verified(corpus: Path) -> bool:
    parser = argparse.ArgumentParser()
    verify.add_arguments(parser)
    return verify.run(parser.parse_args([str(corpus)]))["passed"]


def test_grown_corpus_keeps_earlier_files_and_adds_new_documents(run, folder: Path, files_of, tmp_path: Path) -> None:
    run()
    corpus, other = tmp_path / "corpus", tmp_path / "grown"
    before = files_of(corpus)
    grow(folder)
    encoded = []
    manifest, found = run(
        "grown", lambda stage, done, total: stage == "encode" and encoded.append(total), continues=str(corpus)
    )
    assert files_of(corpus) == before
    after, shards = files_of(other), [name for name in before if name.endswith((".tar", ".idx"))]
    assert all(after[name] == before[name] for name in [*shards, "tokenizer.model"])
    for ending in ("tar", "tokens"):  # hard links on the same disk
        assert (other / f"train-000000.{ending}").samefile(corpus / f"train-000000.{ending}")
    assert {Path(name).stem for name in after if name.endswith(".tokens")} == {
        Path(name).stem for name in after if name.endswith(".tar")
    }
    new = {f"{'ab'[i % 2]}/0{i}.txt": text(i) for i in range(30, 42)}
    assert set(encoded) == {sum(len(each.encode()) for each in new.values())}
    for split in ("train", "validation"):
        earlier = stored(corpus, split)
        assert dict(list(stored(other, split).items())[: len(earlier)]) == earlier
    added = {path: each for split in manifest.splits for path, each in stored(other, split).items() if path in new}
    assert added == new
    assert found["documents_added"] == manifest.documents("train") + manifest.documents("validation") - 30 == 12
    assert manifest.licences == {"unknown": 42}
    assert manifest.provenance["continues"] == [Manifest.read(corpus).sha256]
    assert verified(other)


def test_grown_corpus_has_the_same_splits_as_a_new_one(run, folder, tmp_path) -> None:
    manifest = grown(run, folder, tmp_path)
    run("anew", tokenizer={"reuse": str(tmp_path / "corpus")})
    # Of two equal texts, the grown corpus keeps the earlier one, the new corpus the first by name.
    same = {"a/0-again.txt": "b/01.txt", "a/0-nearly.txt": "b/03.txt"}
    keys = []
    for split, shards in manifest.splits.items():
        anew = {same.get(path, path) for path in stored(tmp_path / "anew", split)}
        assert set(stored(tmp_path / "grown", split)) == anew
        for shard in shards:
            tar = str(tmp_path / "grown" / shard.file)
            keys += [sample["__key__"] for sample in webdataset.WebDataset(tar, shardshuffle=False)]
    assert len(keys) == len(set(keys)) == 42


def test_grown_corpus_can_be_continued_again_and_is_reused(run, folder: Path, tmp_path: Path) -> None:
    first = grown(run, folder, tmp_path)
    (folder / "last.txt").write_text(text(99))
    second, found = run("twice", continues=str(tmp_path / "grown"))
    assert found["documents_added"] == 1
    assert second.provenance["continues"] == [first.sha256, Manifest.read(tmp_path / "corpus").sha256]
    assert run("twice", continues=str(tmp_path / "grown")) == (second, {"reused": True})
    with pytest.raises(UserError, match="it continues another corpus"):
        run("twice")
    with pytest.raises(UserError, match="it continues another corpus"):
        run("twice", continues=str(tmp_path / "corpus"))


def test_records_appended_to_a_file_are_added(run, tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps({"text": text(i)}) + "\n" for i in range(20)))
    source = {"kind": "jsonl", "path": str(path)}
    run(source=source)
    with path.open("a") as file:
        file.writelines(json.dumps({"text": text(i)}) + "\n" for i in range(20, 25))
    _, found = run("grown", source=source, continues=str(tmp_path / "corpus"))
    assert found["documents_added"] == 5
    assert verified(tmp_path / "grown")


def test_corpus_that_cannot_be_continued_is_refused_with_the_reason(run, folder: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    run()
    with pytest.raises(UserError, match="nothing to add"):
        run("grown", continues=str(corpus))
    with pytest.raises(UserError, match="give another output"):
        run(continues=str(corpus))
    grow(folder)
    with pytest.raises(UserError, match=r"prepared with other settings \(settings\.seed\)"):
        run("grown", continues=str(corpus), seed=1)
    with pytest.raises(UserError, match="no prepared corpus"):
        run("grown", continues=str(tmp_path / "nowhere"))
    (folder / "a" / "00.txt").write_text("another text")
    with pytest.raises(UserError, match=r"1 of the 30 documents of .* were removed from the source or changed"):
        run("grown", continues=str(corpus))
    index = corpus / "train-000000.idx"
    index.write_bytes(index.read_bytes()[:-1])
    with pytest.raises(UserError, match="its index is damaged"):
        run("grown", continues=str(corpus))
    assert not (tmp_path / "grown" / "manifest.json").exists()


def test_run_resumes_on_the_earlier_corpus_but_not_on_the_grown_one(run, folder, tmp_path) -> None:
    def loader(name: str) -> Loader:
        config = parse(DataConfig, {"corpus": str(tmp_path / name)})
        return Loader(config, open_corpora(config), Share(length=64, rows=4, micro_rows=4), block=8, seed=0)

    run()
    state, rows = loader("corpus").state_dict(3), loader("corpus").tokens(3)
    grow(folder)
    run("grown", continues=str(tmp_path / "corpus"))
    loader("corpus").load_state_dict(state)
    assert np.array_equal(loader("corpus").tokens(3), rows)
    with pytest.raises(UserError, match=r"corpus: [0-9a-f]{64} then, [0-9a-f]{64} now"):
        loader("grown").load_state_dict(state)


def test_new_documents_join_the_split_of_their_group_in_the_earlier_corpus() -> None:
    train, validation, test = (SPLITS.index(split) for split in ("train", "validation", "test"))
    table = np.zeros(5, TABLE)
    table["bytes"], table["chunk"] = 10, 0
    table["digest"][:, 0] = [3, 3, 7, 8, 9]
    table["split"] = [test, 0, 0, 0, 0]
    table["group"] = [0, 0, 5, 5, 0]
    earlier = np.array([0, train, 0, validation, 0], np.uint8)
    kept = deduplicate(table, None, DedupConfig(method="exact"), earlier)
    # A test document that the earlier corpus has in train is dropped, because it cannot be removed from train.
    assert kept.keep.tolist() == [False, True, True, True, True]
    plan = assign(
        table,
        kept,
        validation_fraction=0.0,
        shard_bytes=1000,
        seed=0,
        earlier=earlier,
        shards={train: 4, validation: 2},
    )
    found = [(int(row["digest"][0]), int(row["split"]), int(row["key"]), int(row["shard"])) for row in plan]
    assert found == [(9, train, 3, 4), (7, validation, 2, 2)]


@pytest.mark.parametrize("seed", range(5))
def test_repeated_document_ids_are_found_as_often_as_they_occur(seed: int) -> None:
    rng = random.Random(seed)
    held = [(rng.randrange(6), rng.choice([1, 2])) for _ in range(12)]
    new = [rng.randrange(8) for _ in range(6)]
    earlier = Earlier.__new__(Earlier)
    earlier.directory = Path("there")
    earlier.ids, earlier.splits = (np.array(each) for each in zip(*held, strict=True))
    ids = [number for number, _ in held] + new
    rng.shuffle(ids)
    found = earlier.found_in(np.array(ids, np.uint64))
    for number in set(ids):
        expected = sorted(split for held_id, split in held if held_id == number)
        own = [split for one, split in zip(ids, found.tolist(), strict=True) if one == number]
        assert sorted(filter(None, own)) == expected and own[: len(expected)] == [s for s in own if s]
    with pytest.raises(UserError, match="1 of the 12 documents"):
        earlier.found_in(np.array([number for number, _ in held[1:]], np.uint64))
