"""`bst bench index` with small sizes: its corpora are valid, and its counts are right."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest

from bst_base.errors import UserError
from data_pipeline.bench.endless import make_endless
from data_pipeline.commands import bench_index
from data_pipeline.format.manifest import Manifest
from data_pipeline.format.verify import VerifyTask, verify_extents, verify_shard
from data_pipeline.serve.reader import Corpus


def arguments(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench_index.add_arguments(parser)
    return parser.parse_args([*given, "--seconds", "0.1"])


def test_corpus_of_linked_shards_is_valid(tmp_path: Path) -> None:
    directory = tmp_path / "endless"
    make_endless(directory, 450, 100, 300, linked=True)
    manifest, corpus = Manifest.read(directory), Corpus.open(str(directory))
    assert (len(manifest.shards("train")), len(corpus)) == (5, 500)
    assert not verify_extents(directory, manifest)
    task = VerifyTask(directory, manifest.shards("train")[4], manifest.tokenizer.vocab_size, "uint16")
    outside = [problem for problem in verify_shard(task) if "outside the vocabulary" not in problem.what]
    assert not outside  # its tokens have more ids than its small tokenizer
    assert corpus.shard_sizes(None).tokens.sum() == corpus.lengths.sum() == 5 * corpus.lengths[:100].sum()
    assert np.array_equal(corpus.document(3), corpus.document(403))


def test_isolated_benchmark_reports_each_corpus_size() -> None:
    found = bench_index.run(arguments("--documents", "1e3", "4e3", "--per-shard", "500", "--isolated"))["sizes"]
    assert [(each["documents"], each["shards"], each["open_shards"]) for each in found] == [(1000, 2, 2), (4000, 8, 8)]
    assert all(each["steps"] >= 1 and each["first_batch_s"] > 0 and 0 <= each["waited"] <= 1 for each in found)


def test_benchmark_measures_several_ranks_and_reports_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    (found,) = bench_index.run(arguments("--documents", "4e3", "--per-shard", "500", "--ranks", "2"))["sizes"]
    assert (found["ranks"], found["open_shards"]) == (2, 8)
    assert found["private_mb_at_end"] > 0
    monkeypatch.setattr(
        bench_index,
        "make_endless",
        lambda folder, *_, **__: folder.mkdir() or (folder / "manifest.json").write_text("{}"),
    )
    with pytest.raises(UserError, match="measuring failed:"):
        bench_index.run(arguments("--documents", "4e3", "--ranks", "2"))


def test_each_index_and_shard_is_requested_once_from_the_server() -> None:
    (found,) = bench_index.run(arguments("--documents", "4000", "--per-shard", "500", "--latency-ms", "1", "--cache"))[
        "sizes"
    ]
    assert found["requests"] == {"manifest.json": 1, "tokenizer.model": 1, ".idx": 8, ".tar": 8}


def test_cache_option_without_latency_is_refused() -> None:
    with pytest.raises(UserError, match="add --latency-ms"):
        bench_index.run(arguments("--cache"))


@pytest.mark.parametrize("given", ["--documents abc", "--documents inf", "--mean 0", "--latency-ms -1", "--seconds 0"])
def test_invalid_benchmark_numbers_are_refused(given: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        arguments(*given.split())
    assert f"argument {given.split()[0]}: " in capsys.readouterr().err
