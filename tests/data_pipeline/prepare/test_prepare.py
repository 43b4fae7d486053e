"""A prepared corpus contains every text exactly, in shards that standard tools read, and records how it was made."""

from __future__ import annotations

import gzip
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import webdataset

from bst_base.errors import UserError
from bst_base.settings import ConfigError, load, parse
from data_pipeline.format.manifest import Manifest, sha256_file
from data_pipeline.format.shards import ShardIndex
from data_pipeline.format.tokenizer import read_tokenizer
from data_pipeline.format.verify import verify_tokenizer
from data_pipeline.prepare import assemble
from data_pipeline.prepare.config import PrepareConfig


def stored(corpus: Path, split: str) -> dict[str, str]:
    """Return path and text of every document of a split, read by plain webdataset and the tokenizer."""
    manifest = Manifest.read(corpus)
    tokenizer = read_tokenizer(corpus / manifest.tokenizer.file)
    urls = [str(corpus / shard.file) for shard in manifest.splits[split]]
    texts = {}
    for sample in webdataset.WebDataset(urls, shardshuffle=False).decode():
        tokens, info = sample["tok.npy"], sample["json"]
        assert tokens[-1] == tokenizer.eos_id
        assert info["n_tokens"] == len(tokens)
        texts[info["path"]] = tokenizer.decode(tokens[:-1])
        assert tokens[:-1].tolist() == tokenizer.encode(texts[info["path"]]).tolist()
        assert info["n_bytes"] == len(texts[info["path"]].encode())
    return texts


@pytest.mark.parametrize("together", [1, 1000, 1 << 22])
def test_shards_contain_every_text_exactly(
    run, folder: Path, tmp_path: Path, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assemble, "_TOGETHER", together)
    run()
    train, validation = stored(tmp_path / "corpus", "train"), stored(tmp_path / "corpus", "validation")
    assert validation
    assert not train.keys() & validation.keys()
    expected = {f.relative_to(folder).as_posix(): f.read_bytes().decode() for f in folder.rglob("*.txt")}
    assert train | validation == expected
    assert list(train) == sorted(train)


def test_corpus_is_prepared_with_a_published_tokenizer(run, folder: Path, tmp_path: Path) -> None:
    """A tokenizer.json without a padding token, like GPT-2's; another corpus then reuses it from this one."""
    published = tokenizers.Tokenizer(tokenizers.models.BPE())
    published.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    published.decoder = tokenizers.decoders.ByteLevel()
    texts = [file.read_text() for file in folder.rglob("*.txt")]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|endoftext|>"],
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    published.train_from_iterator(texts, trainer)
    published.save(str(tmp_path / "tokenizer.json"))
    manifest, _ = run(tokenizer={"reuse": str(tmp_path / "tokenizer.json")})
    corpus, end = tmp_path / "corpus", published.token_to_id("<|endoftext|>")
    found = manifest.tokenizer
    assert (found.file, found.vocab_size, found.bos_id, found.eos_id, found.pad_id) == (
        "tokenizer.json",
        published.get_vocab_size(),
        end,
        end,
        end,
    )
    expected = {f.relative_to(folder).as_posix(): f.read_bytes().decode() for f in folder.rglob("*.txt")}
    assert stored(corpus, "train") | stored(corpus, "validation") == expected
    assert not verify_tokenizer(corpus, manifest)
    for sample in webdataset.WebDataset(str(corpus / manifest.splits["train"][0].file), shardshuffle=False).decode():
        text = expected[sample["json"]["path"]]
        assert sample["tok.npy"].tolist() == [*published.encode(text).ids, end]
    again, _ = run("again", tokenizer={"reuse": str(corpus)})
    assert again.tokenizer == found


def test_manifest_counts_equal_the_content_of_the_corpus(run, tmp_path: Path) -> None:
    manifest, _ = run()
    corpus = tmp_path / "corpus"
    keys = []
    for split in ("train", "validation"):
        texts = stored(corpus, split)
        assert manifest.documents(split) == len(texts)
        assert manifest.text_bytes(split) == sum(len(text.encode()) for text in texts.values())
        for shard in manifest.splits[split]:
            index = ShardIndex.read(corpus / shard.index)
            assert (shard.documents, shard.tokens) == (len(index.lengths), index.lengths.sum())
            assert sha256_file(corpus / shard.file) == shard.sha256 == index.tar_sha256
            assert sha256_file(corpus / shard.index) == shard.index_sha256
            keys += [s["__key__"] for s in webdataset.WebDataset(str(corpus / shard.file), shardshuffle=False)]
    assert len(manifest.splits["train"]) > 1
    assert len(set(keys)) == len(keys) == 30
    assert manifest.tokenizer.sha256 == sha256_file(corpus / "tokenizer.model")
    assert manifest.licences == {"unknown": 30}


def test_two_preparations_are_byte_identical_and_contain_no_directory_name(run, files_of, tmp_path: Path) -> None:
    run("one")
    run("two")
    one = files_of(tmp_path / "one")
    assert one == files_of(tmp_path / "two")
    assert not any(str(tmp_path).encode() in data for data in one.values())


def test_preparation_with_the_same_settings_reuses_the_corpus(run, files_of, tmp_path: Path) -> None:
    first, _ = run()
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "corpus").iterdir() if f.name != ".lock"}
    again, found = run()
    assert found["reused"]
    assert again == first
    assert {f: f.stat().st_mtime_ns for f in (tmp_path / "corpus").iterdir() if f.name != ".lock"} == before


@pytest.mark.parametrize("lost", ["train-000001.tar", "train-000000.idx", "cut", "tokenizer.model"])
def test_corpus_with_a_missing_or_cut_file_is_not_reused(run, files_of, tmp_path: Path, lost: str) -> None:
    first, _ = run()
    whole, corpus = files_of(tmp_path / "corpus"), tmp_path / "corpus"
    if lost == "cut":
        lost = "train-000001.tar"
        (corpus / lost).write_bytes(whole[lost][:-512])
    else:
        (corpus / lost).unlink()
    with pytest.raises(UserError, match=rf"{re.escape(lost)}.* missing"):
        run()
    (corpus / "manifest.json").unlink()
    again, _ = run()
    assert again == first and files_of(corpus) == whole


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed: 0 there, 1 now"),
        ({"tokenizer": {"vocab_size": 700}}, "vocab_size: 600 there, 700 now"),
        ({"text": {"normalise": ["nfc"]}}, r"text\.normalise"),
    ],
)
def test_other_settings_in_the_same_directory_are_refused(
    run, files_of, tmp_path: Path, change: dict, named: str
) -> None:
    run()
    before = files_of(tmp_path / "corpus")
    with pytest.raises(UserError, match=named):
        run(**change)
    assert files_of(tmp_path / "corpus") == before


def test_a_source_that_changed_since_is_refused(run, folder: Path) -> None:
    run()
    (folder / "new.txt").write_text("more")
    with pytest.raises(UserError, match=r"source\.parts: 30 there, 31 now"):
        run()


def test_edit_of_a_source_with_the_same_size_and_time_is_detected(run, folder: Path) -> None:
    run()
    file = folder / "a/00.txt"
    stat, data = file.stat(), file.read_bytes()
    file.write_bytes(data.replace(b"w", b"v"))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(UserError, match="the source's files are not those it was made from"):
        run()
    file.write_bytes(data)
    assert run()[1]["reused"]


def test_output_at_a_url_is_refused(settings_of) -> None:
    with pytest.raises(ConfigError, match=r"output: must be a path on this machine's .*bst data push DIRECTORY s3://"):
        parse(PrepareConfig, settings_of() | {"output": "s3://bucket/corpus"})


def test_bad_records_are_left_out_and_listed_up_to_a_limit(run, tmp_path: Path) -> None:
    (tmp_path / "json").mkdir()
    rows = [json.dumps({"text": f"line {i} " + "x y z " * i}) for i in range(60)]
    (tmp_path / "json/a.jsonl").write_text("\n".join([*rows, "{bad", '{"t": 1}', '{"text": 3}']))
    (tmp_path / "json/b.jsonl.gz").write_bytes(b"not gzip")
    settings = {"source": {"kind": "jsonl", "path": str(tmp_path / "json")}, "tokenizer": {"vocab_size": 300}}
    with pytest.raises(UserError, match=r"a\.jsonl:61: not JSON .*; mend it, or set on_bad_record to skip"):
        run(**settings)
    manifest, _ = run(**settings, on_bad_record="skip")
    assert manifest.provenance["left_out"] == {
        "field 'text' is not text": 1,
        "no field 'text'": 1,
        "not JSON": 1,
        "not read completely": 1,
    }
    listed = [json.loads(line) for line in (tmp_path / "corpus/skipped.jsonl").read_text().splitlines()]
    assert [each["path"] for each in listed] == ["a.jsonl:61", "a.jsonl:62", "a.jsonl:63", "b.jsonl.gz"]
    with pytest.raises(UserError, match=r"4 bad records so far, more than bad_record_limit \(3\) allows"):
        run("other", **settings, on_bad_record="skip", bad_record_limit=3)


def test_unreadable_source_or_unwritable_output_gives_one_message(
    run, folder: Path, tmp_path: Path, monkeypatch
) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="file/corpus: cannot be written: Not a directory; choose another output"):
        run("file/corpus")
    real = Path.open

    def refuse(self: Path, *args, **kwargs):
        if self.name == "00.txt":
            raise PermissionError(13, "Permission denied", str(self))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)  # because root may read everything
    with pytest.raises(UserError, match=r"a/00\.txt: cannot be read: Permission denied; .*on_bad_record to skip"):
        run()
    manifest, _ = run(on_bad_record="skip")
    assert manifest.provenance["left_out"] == {"cannot be read: Permission denied": 1}


def test_a_file_name_that_is_not_unicode_is_prepared(run, folder: Path, tmp_path: Path) -> None:
    (folder / "n\udcff.txt").write_text("a text of its own")
    run(validation_fraction=0.0)
    assert "n\\xff.txt" in stored(tmp_path / "corpus", "train")


def test_compressed_or_parquet_data_named_as_text_is_identified(run, folder: Path) -> None:
    (folder / "z.txt").write_bytes(gzip.compress(b"text"))
    with pytest.raises(UserError, match=r"z\.txt: gzip data, not text; let its name end in \.gz, and source\.pattern"):
        run()
    (folder / "z.txt").rename(folder / "z.txt.gz")
    manifest, _ = run(source={"kind": "folder", "path": str(folder), "pattern": "**/*.txt*"})
    assert sum(manifest.documents(split) for split in manifest.splits) == 31
    (folder / "z.txt").write_bytes(b"PAR1\x15\xff")
    with pytest.raises(UserError, match=r"z\.txt: Parquet data, not text; read it with the source parquet"):
        run("other")


def test_kept_metadata_is_stored_with_the_tokens(run, tmp_path: Path) -> None:
    (tmp_path / "json").mkdir()
    rows = [json.dumps({"text": f"line {i} " + "x y z " * i, "meta": {"url": f"u{i}"}}) for i in range(60)]
    (tmp_path / "json/a.jsonl").write_text("\n".join(rows))
    source = {"kind": "jsonl", "path": str(tmp_path / "json/a.jsonl"), "keep": ["meta.url"]}
    manifest, _ = run(source=source, tokenizer={"vocab_size": 300})
    shards = [str(tmp_path / "corpus" / shard.file) for shard in manifest.splits["train"]]
    for sample in webdataset.WebDataset(shards, shardshuffle=False).decode():
        number = int(sample["json"]["path"].rpartition(":")[2]) - 1
        assert sample["json"]["meta"] == {"meta.url": f"u{number}"}


def test_adding_documents_moves_no_document_between_splits(run, folder: Path, tmp_path: Path) -> None:
    run("before")
    for i in range(20):
        (folder / f"0{i}.txt").write_text(f"an additional text {i} " * 20)
    run("after")
    for split in ("train", "validation"):
        assert stored(tmp_path / "before", split).items() <= stored(tmp_path / "after", split).items()


def test_duplicates_are_removed_and_counted(run, folder: Path, tmp_path: Path) -> None:
    """`a/00.txt` is copied, and `b/01.txt` is copied with an added word; the first of each is kept."""
    (folder / "z1.txt").write_bytes((folder / "a/00.txt").read_bytes())
    (folder / "z2.txt").write_bytes((folder / "b/01.txt").read_bytes() + b" changed")
    manifest, _ = run("both")
    assert manifest.provenance["duplicates"] == {"exact": 1, "near": 1}
    assert (
        not {"z1.txt", "z2.txt"} & (stored(tmp_path / "both", "train") | stored(tmp_path / "both", "validation")).keys()
    )
    manifest, _ = run("exact", deduplicate={"method": "exact"})
    assert manifest.provenance["duplicates"] == {"exact": 1, "near": 0}
    manifest, _ = run("none", deduplicate={"method": "none"})
    assert sum(manifest.documents(split) for split in manifest.splits) == 32


def test_another_corpus_tokenizer_can_be_reused(run, tmp_path: Path) -> None:
    first, _ = run("first")
    second, _ = run("second", tokenizer={"reuse": str(tmp_path / "first")}, seed=5)
    assert second.tokenizer == first.tokenizer
    assert stored(tmp_path / "second", "train")
    run("other", tokenizer={"vocab_size": 500})
    (tmp_path / "other/tokenizer.model").replace(tmp_path / "first/tokenizer.model")
    with pytest.raises(UserError, match=r"first/tokenizer\.model: not the tokenizer that the corpus was made with"):
        run("third", tokenizer={"reuse": str(tmp_path / "first")})


def test_splits_given_by_a_source_are_kept(run, tmp_path: Path) -> None:
    for split, books in {"train": 4, "validation": 2, "test": 1}.items():
        (tmp_path / "pg19" / split).mkdir(parents=True)
        for i in range(books):
            (tmp_path / "pg19" / split / f"{len(split)}{i}.txt").write_text(
                "\n".join(f"{split} {i} word{j * j}" for j in range(99))
            )
    (tmp_path / "pg19" / "train" / "999.txt").write_bytes((tmp_path / "pg19/test/40.txt").read_bytes())
    manifest, _ = run(
        source={"kind": "pg19", "path": str(tmp_path / "pg19")},
        tokenizer={"vocab_size": 300},
        deduplicate={"method": "exact"},
    )
    assert {split: manifest.documents(split) for split in manifest.splits} == {"train": 4, "validation": 2, "test": 1}
    assert list(stored(tmp_path / "corpus", "test")) == ["test/40.txt"]


def test_text_is_normalised_only_on_request(run, folder: Path, tmp_path: Path) -> None:
    (folder / "n.txt").write_bytes("a\r\nb\rc e\u0301".encode())
    run("plain", validation_fraction=0.0)
    assert stored(tmp_path / "plain", "train")["n.txt"] == "a\r\nb\rc e\u0301"
    run("mended", validation_fraction=0.0, text={"normalise": ["newlines", "nfc"]})
    assert stored(tmp_path / "mended", "train")["n.txt"] == "a\nb\nc \u00e9"


def test_tokenizer_sample_is_bounded_and_evenly_distributed(tmp_path: Path) -> None:
    """The sample is a third of the windows of a spool, in order, from every part of it."""
    from data_pipeline.prepare.spool import ChunkTask, extract_chunk, load_tables, read_windows, stamps
    from data_pipeline.prepare.text import TextConfig
    from data_pipeline.sources import SOURCES

    (tmp_path / "text").mkdir()
    for name in "abc":
        (tmp_path / "text" / f"{name}.txt").write_text("".join(f"{name}{i:03d}" for i in range(100)))
    source = SOURCES["folder"](path=tmp_path / "text")
    parts = tuple(source.listing().parts)
    extract_chunk(ChunkTask(tmp_path, 0, source, parts, TextConfig(), False, "stop", stamps(source, parts)))
    windows = list(read_windows(tmp_path, load_tables(tmp_path, 1), window=8, share=1 / 3))
    assert len(windows) == 50
    assert windows[:2] == ["a000a001", "a006a007"]
    assert {window[0] for window in windows} == set("abc")


def test_a_config_file_with_a_misspelt_source_setting_names_the_right_one(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("source: {kind: folder, path: x, patern: y}\noutput: y\n")
    with pytest.raises(ConfigError, match=r"c\.yaml: source: folder: unknown key 'patern': did you mean 'pattern'\?"):
        load(PrepareConfig, tmp_path / "c.yaml")
    (tmp_path / "d.yaml").write_text("source: {kind: foldr}\noutput: y\n")
    with pytest.raises(ConfigError, match=r"d\.yaml: source: kind must be one of stdlib, folder, "):
        load(PrepareConfig, tmp_path / "d.yaml")


def test_packed_files_are_written_only_for_short_documents(run, folder: Path, tmp_path: Path) -> None:
    """The manifest, and so the corpus's identity, does not depend on whether packed files exist."""
    manifest, _ = run()
    for split, shards in manifest.splits.items():
        for shard in shards:
            size = (tmp_path / "corpus" / shard.file).with_suffix(".tokens").stat().st_size
            assert 0 < size - 2 * shard.tokens < 100, split
    assert b".tokens" not in manifest.to_bytes()
    for file in folder.rglob("*.txt"):
        file.write_text(" ".join(f"{file.stem}-{number}" for number in range(8000)))
    long, _ = run("long", shard_bytes=1 << 20)
    assert min(shard.tokens / shard.documents for shards in long.splits.values() for shard in shards) > 4000
    assert not list((tmp_path / "long").glob("*.tokens"))


@pytest.mark.parametrize("config", sorted(Path(__file__).parents[3].glob("launch/data/*.yaml")), ids=lambda p: p.stem)
def test_configs_in_the_repository_are_valid(config: Path) -> None:
    assert load(PrepareConfig, config).source.kind == config.stem


def test_skipped_documents_are_listed_with_reasons(run, folder: Path, tmp_path: Path) -> None:
    (folder / "empty.txt").write_bytes(b"")
    (folder / "bad.txt").write_bytes(b"fine \xff not")
    manifest, _ = run(text={"undecodable": "skip"})
    listed = [json.loads(line) for line in (tmp_path / "corpus/skipped.jsonl").read_text().splitlines()]
    assert listed == [
        {"path": "bad.txt", "reason": "not UTF-8 (byte 5 is 0xff)"},
        {"path": "empty.txt", "reason": "empty"},
    ]
    assert manifest.provenance["left_out"] == {"empty": 1, "not UTF-8": 1}


def test_document_ids_and_clusters_do_not_depend_on_seed_or_shards(run, tmp_path: Path) -> None:
    run("one", seed=0)
    run("two", seed=7, shard_bytes=1000000)

    def names(corpus: Path) -> dict[str, tuple]:
        shards = [s.file for infos in Manifest.read(corpus).splits.values() for s in infos]
        samples = webdataset.WebDataset([str(corpus / s) for s in shards], shardshuffle=False).decode()
        return {s["json"]["path"]: (s["json"]["id"], s["json"]["dedup_cluster"]) for s in samples}

    assert names(tmp_path / "one") == names(tmp_path / "two")
    assert len(np.unique([name[0] for name in names(tmp_path / "one").values()])) == 30
