"""Statistics equal explicit counts; planted overlap between splits is found."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bst_dist.cli import main
from data_pipeline.format import stats
from data_pipeline.format.stats import length_histogram, overlap, run_hashes, sample_runs, scan_shard
from data_pipeline.serve.reader import Corpus


@given(
    tokens=st.lists(st.integers(0, 3), max_size=60).map(lambda x: np.array(x, "<u2")),
    n=st.sampled_from([1, 2, 4, 8]),
)
def test_runs_have_equal_hashes_exactly_when_they_are_equal(tokens: np.ndarray, n: int) -> None:
    hashes = run_hashes(tokens, n).tolist()
    runs = [tuple(tokens[i : i + n].tolist()) for i in range(len(tokens) - n + 1)]
    assert len(hashes) == len(runs)
    assert len(set(hashes)) == len(set(runs))
    assert len(set(zip(hashes, runs, strict=True))) == len(set(runs))


@given(lengths=st.lists(st.integers(1, 10**6), min_size=1, max_size=50).map(np.array))
def test_histogram_counts_documents_by_powers_of_two(lengths: np.ndarray) -> None:
    edges, counts = length_histogram(lengths)
    assert counts.sum() == len(lengths)
    for edge, count in zip(edges.tolist(), counts.tolist(), strict=False):
        assert count == sum(edge <= length < 2 * edge for length in lengths.tolist())


@pytest.fixture
def planted(run, folder: Path, tmp_path: Path) -> Path:
    """A corpus of thirty texts; train repeats one validation text completely inside a longer text."""
    _, _ = run("first")
    from data_pipeline.format.manifest import Manifest
    from data_pipeline.format.shards import read_shard

    shard = Manifest.read(tmp_path / "first").splits["validation"][0]
    with (tmp_path / "first" / shard.file).open("rb") as file:
        path = next(read_shard(file, "x"))[1]["path"]
    copied = (folder / path).read_text()
    more = "".join(f"and {i * i} more words\n" for i in range(300))
    (folder / "copy.txt").write_text(f"{more}\n{copied}\n{more}")
    run("second", validation_fraction=0.2)
    return tmp_path / "second"


def test_validation_text_repeated_in_train_is_found(planted: Path) -> None:
    from data_pipeline.format.manifest import Manifest

    manifest = Manifest.read(planted)
    outside = manifest.splits["validation"]
    wanted = sample_runs(planted, outside)
    tars = [planted / shard.file for shard in manifest.splits["train"]]
    found = np.unique(np.concatenate([scan_shard(stats.ScanTask(tar, wanted)).found for tar in tars]))
    result = overlap(planted, outside, wanted, found)
    assert result.mostly_found == 1
    assert result.documents == manifest.documents("validation")
    assert 0 < result.found < result.runs


def test_stats_report_the_padding_of_isolated_documents_per_block_size(run, tmp_path: Path, capsys) -> None:
    run("corpus")
    assert main(["data", "stats", str(tmp_path / "corpus"), "--quick", "--json", str(tmp_path / "stats.json")]) == 0
    splits = [Corpus.open(str(tmp_path / "corpus"), split) for split in ("train", "validation")]
    lengths = [n for corpus in splits for n in corpus.lengths.tolist()]
    told = json.loads((tmp_path / "stats.json").read_text())["padding_isolated"]
    assert told["256"] == round(1 - sum(lengths) / sum(-(-n // 256) * 256 for n in lengths), 4)
    assert f"{told['256']:.1%} of 256" in capsys.readouterr().out


def test_stats_count_cut_documents_for_both_packings(run, tmp_path: Path, capsys) -> None:
    run("corpus")
    command = ["data", "stats", str(tmp_path / "corpus"), "--quick", "--length", "5000", "--json"]
    assert main([*command, str(tmp_path / "stats.json")]) == 0
    counts = json.loads((tmp_path / "stats.json").read_text())["cut_by_sequences"]
    lengths = Corpus.open(str(tmp_path / "corpus")).lengths
    assert counts["documents"] == (lengths <= 5000).sum() == len(lengths)
    # There is a cut for each end of a sequence that is not the end of a document; this bounds the number of cuts.
    assert 0 <= counts["best_fit"] <= counts["stream"] <= lengths.sum() // 5000
    assert f"sequences cut {counts['stream']:,} (" in capsys.readouterr().out


def test_sample_of_runs_is_the_smallest_hashes(planted: Path, monkeypatch) -> None:
    from data_pipeline.format.manifest import Manifest

    outside = Manifest.read(planted).splits["validation"]
    everything = sample_runs(planted, outside)
    monkeypatch.setattr(stats, "_SAMPLE", 50)
    assert sample_runs(planted, outside).tolist() == everything[:50].tolist()


def test_sampling_short_documents_needs_few_merges(tmp_path: Path, monkeypatch) -> None:
    """Earlier, the whole sample was merged for every document, which never ended for a corpus of short documents."""
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 50, 40).astype("<u2") for _ in range(300)]
    every = np.unique(np.concatenate([run_hashes(tokens) for tokens in documents]))
    monkeypatch.setattr(stats, "_documents", lambda _: iter(documents))
    merges, merged = [], stats._merged
    monkeypatch.setattr(stats, "_merged", lambda *parts: merges.append(1) or merged(*parts))
    for sample in (500, 1 << 21):
        monkeypatch.setattr(stats, "_SAMPLE", sample)
        merges.clear()
        assert np.array_equal(sample_runs(tmp_path, []), every[:sample])
        assert len(merges) <= 1 + 300 * 9 // sample
