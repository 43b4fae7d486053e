"""Exact and near duplicates: which documents are kept, and which documents must be in the same split.

Near duplicates are found by MinHash (Broder 1997) with banding. Documents whose signatures agree in a whole band are
compared. They count as duplicates when the fraction of equal signature entries reaches the threshold. This fraction is
an unbiased estimate of the Jaccard similarity of their sets of 5-grams. The 5-grams consist of words, or of characters
in scripts without spaces between words (Chinese, Japanese, Thai and similar ones). rensa computes the signatures. Bands
are compared one at a time over a file of signatures, so memory is a few numbers per document.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from functools import lru_cache
from typing import Literal

import numpy as np
from pydantic import Field
from rensa import RMinHash

from bst_base.settings import Config
from data_pipeline.prepare.word_hashes import word_hashes

PERMUTATIONS = 128
"""Entries of a signature: the standard error of the similarity is at most 0.044."""

_SHINGLE = 5  # words
_SEED = 1  # of the permutations
_LEADERS = 64  # maximum number of leaders of a bucket that a document is compared with (`_join_similar`)
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


class DedupConfig(Config):
    """When documents count as duplicates. The first of several duplicates is kept."""

    method: Literal["none", "exact", "minhash"] = "minhash"
    """`exact`: equal text; `minhash`: also texts whose word 5-grams mostly agree."""
    similarity: float = Field(0.8, gt=0.0, lt=1.0)
    """`minhash` treats two texts as duplicates when their estimated Jaccard similarity is at least this."""


class Clusters:
    """A union-find structure over the documents 0..n-1. The root of a cluster is its first document."""

    def __init__(self, n: int) -> None:
        self._parent = np.arange(n)

    def root(self, i: int) -> int:
        """Return the first document of the cluster of `i`."""
        parent = self._parent
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return int(i)

    def join(self, i: int, j: int) -> None:
        """Merge the clusters of `i` and `j`."""
        i, j = self.root(i), self.root(j)
        self._parent[max(i, j)] = min(i, j)

    def join_equal(self, values: np.ndarray, documents: np.ndarray | None = None) -> None:
        """Merge the clusters of documents with equal `values`, (k,). `documents`, (k,): the document of each value."""
        for run in _equal_runs(values):
            members = run if documents is None else documents[run]
            for other in members[1:]:
                self.join(members[0], other)

    def roots(self) -> np.ndarray:
        """Return (n,) int64: the root of every document."""
        return np.array([self.root(i) for i in range(len(self._parent))], np.int64)


def signature(text: bytes) -> np.ndarray:
    """Return the MinHash signature of a text's 5-grams, (PERMUTATIONS,) uint32.

    A text of fewer than 5 words is one shingle.
    """
    return signature_of(np.concatenate([np.empty(0, np.uint64), *word_hashes(text)]))


def signature_of(words: np.ndarray) -> np.ndarray:
    """Return the signature of words given as numbers, (n,) uint64: word hashes, or a tokenized source's ids."""
    width = min(_SHINGLE, max(len(words), 1))
    shingles = np.zeros(max(len(words) - width + 1, 1), np.uint64)
    for k in range(width if len(words) else 0):
        shingles = (shingles ^ words[k : k + len(shingles)]) * _MULTIPLIER
        shingles ^= shingles >> np.uint64(29)
    digest = RMinHash.digest_matrix_from_flat_token_hashes(shingles, [0, len(shingles)], PERMUTATIONS, _SEED)
    return np.array(digest.to_rows()[0], np.uint32)


def near_duplicates(signatures: np.ndarray, order: np.ndarray, config: DedupConfig, clusters: Clusters) -> None:
    """Join the documents whose `signatures`, (n, PERMUTATIONS) uint32, show that they are near duplicates.

    `clusters` numbers the documents in `order`, (n,): its document i has the signature `order[i]`.
    """
    bands, rows = banding(config.similarity)
    for band in range(bands):
        columns = np.ascontiguousarray(signatures[:, band * rows : (band + 1) * rows])[order]
        for run in _equal_runs(columns.view(f"V{columns.itemsize * rows}")[:, 0]):
            _join_similar(run, signatures, order, config.similarity, clusters)


@lru_cache
def banding(similarity: float) -> tuple[int, int]:
    """Return (bands, rows per band): the banding that best separates pairs above `similarity` from pairs below.

    A pair of similarity s shares one of b bands of r rows with probability 1 - (1 - s^r)^b. The banding minimises the
    sum of this probability below the threshold (compared in vain) and of its complement above (never compared).
    """
    s = np.linspace(0, 1, 2001)
    costs = {}
    for bands in range(1, PERMUTATIONS + 1):
        for rows in range(1, PERMUTATIONS // bands + 1):
            missed = (1 - s**rows) ** bands
            costs[bands, rows] = float(np.where(s < similarity, 1 - missed, missed).sum())
    return min(costs, key=lambda scheme: costs[scheme])


def _join_similar(
    run: np.ndarray, signatures: np.ndarray, order: np.ndarray, similarity: float, clusters: Clusters
) -> None:
    """Join each document of a bucket to the first leader that it resembles.

    Leaders are documents that resemble no leader before them. Documents are compared with the last `_LEADERS` leaders
    only: otherwise a bucket of a million pages from one template would need a comparison for every pair. A pair that is
    missed here may still meet in its other bands.
    """
    leaders: deque[int] = deque(maxlen=_LEADERS)
    rows = np.empty((_LEADERS, PERMUTATIONS), np.uint32)  # the leaders' signatures; a new one replaces the oldest
    count = 0
    for i in run.tolist():
        own = signatures[order[i]]
        alike = _alike(own, rows[: len(leaders)], similarity)
        places = [(count - len(leaders) + k) % _LEADERS for k in range(len(leaders))] if alike.any() else []
        same = next((leader for leader, place in zip(leaders, places, strict=False) if alike[place]), None)
        if same is not None:
            clusters.join(same, i)
        else:
            rows[count % _LEADERS] = own
            leaders.append(i)
            count += 1


def _alike(own: np.ndarray, others: np.ndarray, similarity: float) -> np.ndarray:
    """Return (k,) bool: which of `others`, (k, PERMUTATIONS), resemble the signature `own`."""
    return (others == own).mean(axis=1) >= similarity


def _equal_runs(values: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the places, ascending, of each value that occurs more than once."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    edges = np.flatnonzero(ordered[1:] != ordered[:-1]) + 1
    starts, ends = np.concatenate([[0], edges]), np.concatenate([edges, [len(order)]])
    for start, end in zip(starts, ends, strict=True):
        if end - start > 1:
            yield order[start:end]
