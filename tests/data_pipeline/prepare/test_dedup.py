"""Duplicates equal those found by brute force; clusters keep their names when documents are added."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.prepare import dedup, word_hashes
from data_pipeline.prepare.assemble import assign, deduplicate
from data_pipeline.prepare.dedup import PERMUTATIONS, Clusters, DedupConfig, near_duplicates, signature
from data_pipeline.prepare.spool import SPLITS, TABLE


def words(seed: int, n: int = 600) -> list[str]:
    rng = random.Random(seed)
    return [f"w{rng.randrange(5000)}" for _ in range(n)]


def shingles(text: str) -> set[tuple[str, ...]]:
    parts = text.split()
    return {tuple(parts[i : i + 5]) for i in range(len(parts) - 4)}


def table(n: int, **columns: np.ndarray) -> np.ndarray:
    """Return a table of n documents with distinct digests; `columns` overrides columns."""
    rows = np.zeros(n, TABLE)
    rows["offset"], rows["bytes"] = np.arange(n), 100
    rows["digest"] = np.arange(n, dtype=np.uint64)[:, None] * np.uint64(0x9E3779B97F4A7C15)
    for name, values in columns.items():
        rows[name] = values
    return rows


@pytest.mark.parametrize("changed", [0, 10, 40, 120])
def test_signatures_estimate_the_jaccard_similarity(changed: int) -> None:
    """Within four standard errors of the exact similarity of the two sets of word 5-grams."""
    first = words(1)
    second = first[: len(first) - changed] + words(2, changed)
    a, b = shingles(" ".join(first)), shingles(" ".join(second))
    exact = len(a & b) / len(a | b)
    estimate = np.mean(signature(" ".join(first).encode()) == signature(" ".join(second).encode()))
    assert abs(estimate - exact) <= 4 * np.sqrt(exact * (1 - exact) / PERMUTATIONS) + 1e-12


def test_case_and_spacing_do_not_matter_but_words_do() -> None:
    text = " ".join(words(3))
    assert np.array_equal(signature(text.encode()), signature(text.upper().replace(" ", "\n\n ").encode()))
    assert np.mean(signature(text.encode()) == signature(" ".join(words(4)).encode())) < 0.1


def test_the_order_of_words_matters() -> None:
    text = words(6)
    assert np.mean(signature(" ".join(text).encode()) == signature(" ".join(sorted(text)).encode())) < 0.1


def test_text_of_fewer_than_five_words_is_similar_only_to_itself() -> None:
    """It is one shingle, so its Jaccard similarity with another text is 0 or 1."""
    texts = [b"b c", b"c c", b"a b c", b"b c c", b"c c c", b"a b c c", b"a b c c d"]
    found = [signature(text) for text in texts]
    for i, one in enumerate(found):
        assert [np.mean(one == other) > 0.1 for other in found] == [i == k for k in range(len(found))]


@pytest.mark.parametrize(("equal", "joined"), [(102, False), (103, True)])
def test_documents_sharing_a_band_are_joined_only_above_the_threshold(equal: int, joined: bool) -> None:
    """103 of 128 is the smallest share above 0.8."""
    pair = np.zeros((2, PERMUTATIONS), np.uint32)
    pair[1, equal:] = 1
    clusters = Clusters(2)
    near_duplicates(pair, np.arange(2), DedupConfig(similarity=0.8), clusters)
    assert (clusters.roots().tolist() == [0, 0]) == joined


def test_slicing_a_long_text_does_not_change_its_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    text = " ".join(words(5)).encode()
    whole = signature(text)
    monkeypatch.setattr(word_hashes, "_SLICE", 100)
    assert np.array_equal(signature(text), whole)


def test_near_duplicates_are_joined_and_others_are_not() -> None:
    bases = [words(seed) for seed in range(20)]
    copies = [[*base[:-15], *words(100 + i, 15)] for i, base in enumerate(bases[:8])]  # similarity about 0.95
    halves = [[*base[:300], *words(200 + i, 300)] for i, base in enumerate(bases[8:16])]  # about 0.33
    every = [" ".join(text).encode() for text in (*bases, *copies, *halves)]
    clusters = Clusters(len(every))
    near_duplicates(np.stack([signature(text) for text in every]), np.arange(len(every)), DedupConfig(), clusters)
    expected = list(range(len(every)))
    expected[20:28] = range(8)
    assert clusters.roots().tolist() == expected


@pytest.mark.parametrize(
    "first",
    [0x4E00, 0x0E01, 0x3041, 0xAC00, 0x1950, 0x1980, 0x1A20, 0x1B05, 0x3100, 0xFF66],
    ids=[
        "Chinese",
        "Thai",
        "Japanese",
        "Korean",
        "Tai Le",
        "New Tai Lue",
        "Tai Tham",
        "Balinese",
        "bopomofo",
        "half-width kana",
    ],
)
def test_texts_that_differ_in_one_character_are_similar_in_every_script(first: int) -> None:
    """In scripts without spaces, 5-grams of characters are used; their exact similarity is computed here."""
    rng = random.Random(first)
    drawn = [chr(first + rng.randrange(40)) for _ in range(400)]
    text = "".join(drawn) if first != 0xAC00 else "".join(c + " " * (i % 3 == 2) for i, c in enumerate(drawn))
    other = text[:200] + chr(first + 45) + text[201:]
    unrelated = "".join(chr(first + rng.randrange(40)) for _ in range(400))
    if first != 0xAC00:
        sets = [{t[i : i + 5] for i in range(len(t) - 4)} for t in (text, other)]
        exact = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
        estimate = np.mean(signature(text.encode()) == signature(other.encode()))
        assert abs(estimate - exact) <= 4 * np.sqrt(exact * (1 - exact) / PERMUTATIONS)
    found = [signature(t.encode()) for t in (text, other, unrelated)]
    assert np.mean(found[0] == found[1]) > 0.8
    assert np.mean(found[0] == found[2]) < 0.2


def test_one_non_ascii_letter_does_not_change_the_words_of_latin_text() -> None:
    text = " ".join(words(7))
    assert np.mean(signature(text.encode()) == signature(f"{text} é".encode())) > 0.95


def test_comparisons_of_pages_from_one_template_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """All pages share their first bands and no two are similar; comparing all pairs would be half a million."""
    n, compared = 1000, []
    rng = np.random.default_rng(0)
    signatures = rng.integers(0, 2**32, (n, PERMUTATIONS), dtype=np.uint32)
    signatures[:, : PERMUTATIONS // 2] = 7
    alike = dedup._alike
    monkeypatch.setattr(dedup, "_alike", lambda own, rows, least: compared.append(len(rows)) or alike(own, rows, least))
    clusters = Clusters(n)
    near_duplicates(signatures, np.arange(n), DedupConfig(), clusters)
    assert clusters.roots().tolist() == list(range(n))
    bands = dedup.banding(0.8)[0]
    assert sum(compared) <= bands * n * dedup._LEADERS
    assert len(compared) >= 3 * n  # the template's bands were compared


def test_documents_are_compared_with_the_latest_cluster_leaders() -> None:
    signatures = np.arange(200, dtype=np.uint32)[:, None] + np.zeros(PERMUTATIONS, np.uint32)
    signatures[:, : PERMUTATIONS // 2] = 7
    signatures = np.concatenate([signatures, signatures[[199, 150]], signatures[[3]]])
    clusters = Clusters(len(signatures))
    near_duplicates(signatures, np.arange(len(signatures)), DedupConfig(), clusters)
    assert clusters.roots()[200:].tolist() == [199, 150, 3]  # 3 finds its duplicate in another band


@pytest.mark.parametrize("similarity", [0.5, 0.8, 0.95])
def test_bands_find_most_similar_pairs_and_few_others(similarity: float) -> None:
    bands, rows = dedup.banding(similarity)
    assert bands * rows <= PERMUTATIONS
    above, below = (1 - (1 - s**rows) ** bands for s in ((1 + similarity) / 2, similarity / 2))
    assert above > 0.7
    assert below < 0.1


@given(values=st.lists(st.integers(0, 5), max_size=30))
def test_equal_values_share_the_root_of_the_first_one(values: list[int]) -> None:
    clusters = Clusters(len(values))
    clusters.join_equal(np.array(values, np.uint64))
    assert clusters.roots().tolist() == [values.index(value) for value in values]


@settings(max_examples=50)
@given(edges=st.lists(st.tuples(st.integers(0, 14), st.integers(0, 14)), max_size=20))
def test_clusters_are_the_connected_components(edges: list[tuple[int, int]]) -> None:
    clusters = Clusters(15)
    reached = np.eye(15, dtype=bool)
    for i, j in edges:
        clusters.join(i, j)
        reached[i, j] = reached[j, i] = True
    for _ in range(4):  # closure by squaring
        reached = reached @ reached
    assert clusters.roots().tolist() == [int(np.flatnonzero(row)[0]) for row in reached]


def test_first_of_equal_texts_is_kept() -> None:
    digest = np.array([[1, 1], [2, 2], [1, 1], [1, 1]])
    kept = deduplicate(table(4, digest=digest), None, DedupConfig(method="exact"))
    assert kept.keep.tolist() == [True, True, False, False]
    assert (kept.exact_duplicates, kept.near_duplicates) == (2, 0)
    assert deduplicate(table(4, digest=digest), None, DedupConfig(method="none")).keep.all()


def test_duplicates_of_test_documents_are_removed_from_train() -> None:
    split = np.array([SPLITS.index(name) for name in ("train", "test", "validation", "train")])
    kept = deduplicate(table(4, digest=np.ones((4, 2)), split=split), None, DedupConfig(method="exact"))
    assert kept.keep.tolist() == [False, True, False, False]


def split_of(rows: np.ndarray, fraction: float = 0.3, seed: int = 0) -> dict[int, str]:
    """Return the split of each document, by the first word of its digest."""
    kept = deduplicate(rows, None, DedupConfig(method="exact"))
    plan = assign(rows, kept, validation_fraction=fraction, shard_bytes=1000, seed=seed)
    return {int(row["digest"][0]): SPLITS[row["split"]] for row in plan}


def test_adding_documents_does_not_change_the_split_of_others() -> None:
    few, many = split_of(table(300)), split_of(table(1000))
    assert {digest: many[digest] for digest in few} == few
    share = np.mean([split == "validation" for split in many.values()])
    assert abs(share - 0.3) < 0.06  # four standard errors of 1000 fair draws


def test_split_depends_on_the_seed() -> None:
    assert split_of(table(300)) != split_of(table(300), seed=1)


def test_documents_of_one_group_are_in_one_split() -> None:
    rows = table(400, group=np.arange(400) // 4 + 1)
    splits = list(split_of(rows).values())
    by_digest = split_of(rows)
    groups = [[by_digest[int(d)] for d in rows["digest"][i : i + 4, 0]] for i in range(0, 400, 4)]
    assert len(splits) == 400
    assert all(len(set(group)) == 1 for group in groups)
    assert {group[0] for group in groups} == {"train", "validation"}


def test_small_corpus_has_a_validation_split() -> None:
    assert list(split_of(table(3), fraction=1e-6).values()).count("validation") == 1
    assert "validation" not in split_of(table(3), fraction=0.0).values()
    assert split_of(table(1), fraction=1e-6) == {0: "train"}


def test_source_with_its_own_validation_split_gets_no_other() -> None:
    split = np.array([0, 0, SPLITS.index("validation")])
    assert list(split_of(table(3, split=split), fraction=1e-6).values()).count("validation") == 1


@given(sizes=st.lists(st.integers(1, 2500), min_size=1, max_size=40))
def test_shards_are_in_corpus_order_and_numbered_without_gaps(sizes: list[int]) -> None:
    rows = table(len(sizes), bytes=sizes)
    kept = deduplicate(rows, None, DedupConfig(method="none"))
    plan = assign(rows, kept, validation_fraction=0.0, shard_bytes=1000, seed=0)
    assert plan["offset"].tolist() == list(range(len(sizes)))
    assert np.unique(plan["shard"]).tolist() == list(range(plan["shard"].max() + 1))
    before = np.cumsum(sizes) - sizes
    for shard in range(plan["shard"].max() + 1):
        starts = before[plan["shard"] == shard]
        assert starts[-1] - starts[0] < 1000
