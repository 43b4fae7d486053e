"""Which documents say the same, exactly or nearly: what is kept, and which documents must share a split.

Near duplicates are found by MinHash (Broder 1997) with banding: documents whose signatures agree in any whole band are
compared, and count as the same when the share of equal signature entries, an unbiased estimate of the Jaccard
similarity of their sets of 5-grams, reaches the threshold. The 5-grams are of words; in scripts that write no spaces
between words (Chinese, Japanese, Thai and their like) of characters. Signatures are made by rensa; the bands are
compared one at a time over a file of signatures, so memory is a few numbers per document.
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
"""Entries of a signature: a standard error of at most 0.044 on the similarity."""

_SHINGLE = 5  # words
_SEED = 1  # of the permutations
_LEADERS = 64  # documents of a bucket that another one is compared with: the last ones that resemble none before them
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


class DedupConfig(Config):
    """What counts as a duplicate; of the documents that say the same the first is kept."""

    method: Literal["none", "exact", "minhash"] = "minhash"
    """`exact`: equal text; `minhash`: also texts whose word 5-grams mostly agree."""
    similarity: float = Field(0.8, gt=0.0, lt=1.0)
    """`minhash` treats two texts as duplicates from this estimated Jaccard similarity on."""


class Clusters:
    """A union-find over documents 0..n-1; the root of a cluster is its first document."""

    def __init__(self, n: int) -> None:
        self._parent = np.arange(n)

    def root(self, i: int) -> int:
        """The first document of the cluster that `i` is in."""
        parent = self._parent
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return int(i)

    def join(self, i: int, j: int) -> None:
        """Put the clusters of `i` and `j` together."""
        i, j = self.root(i), self.root(j)
        self._parent[max(i, j)] = min(i, j)

    def join_equal(self, values: np.ndarray, documents: np.ndarray | None = None) -> None:
        """Put documents with equal `values`, (k,), into one cluster; `documents`, (k,), says whose they are."""
        for run in _equal_runs(values):
            members = run if documents is None else documents[run]
            for other in members[1:]:
                self.join(members[0], other)

    def roots(self) -> np.ndarray:
        """(n,) int64: every document's root."""
        return np.array([self.root(i) for i in range(len(self._parent))], np.int64)


def signature(text: bytes) -> np.ndarray:
    """The MinHash signature of a text's 5-grams, (PERMUTATIONS,) uint32; a shorter text is one shingle."""
    return signature_of(np.concatenate([np.empty(0, np.uint64), *word_hashes(text)]))


def signature_of(words: np.ndarray) -> np.ndarray:
    """The same of words given by numbers, (n,) uint64: their hashes, or the ids of a text that came as such."""
    width = min(_SHINGLE, max(len(words), 1))
    shingles = np.zeros(max(len(words) - width + 1, 1), np.uint64)
    for k in range(width if len(words) else 0):
        shingles = (shingles ^ words[k : k + len(shingles)]) * _MULTIPLIER
        shingles ^= shingles >> np.uint64(29)
    digest = RMinHash.digest_matrix_from_flat_token_hashes(shingles, [0, len(shingles)], PERMUTATIONS, _SEED)
    return np.array(digest.to_rows()[0], np.uint32)


def near_duplicates(signatures: np.ndarray, order: np.ndarray, config: DedupConfig, clusters: Clusters) -> None:
    """Join the documents whose `signatures`, (n, PERMUTATIONS) uint32, say they are near duplicates.

    `clusters` counts documents in `order`, (n,): its document i has the signature `order[i]`.
    """
    bands, rows = banding(config.similarity)
    for band in range(bands):
        columns = np.ascontiguousarray(signatures[:, band * rows : (band + 1) * rows])[order]
        for run in _equal_runs(columns.view(f"V{columns.itemsize * rows}")[:, 0]):
            _join_similar(run, signatures, order, config.similarity, clusters)


@lru_cache
def banding(similarity: float) -> tuple[int, int]:
    """(bands, rows of each) of a signature that best tell pairs above `similarity` from those below.

    A pair of similarity s shares one of b bands of r rows with probability 1 - (1 - s^r)^b; the mean of it below the
    threshold (compared in vain) and of its complement above (never compared) is the least possible.
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
    """Join each document of a bucket to the first of its leaders that it resembles.

    Leaders are those that resemble none before them. Only the last `_LEADERS` are compared with: a bucket of a million
    pages made from one template would need as many comparisons as it has pairs. A pair that is missed here for that has
    its other bands to meet in.
    """
    leaders: deque[int] = deque(maxlen=_LEADERS)
    rows = np.empty((_LEADERS, PERMUTATIONS), np.uint32)  # their signatures, the oldest replaced by the next
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
    """(k,) bool: which of `others`, (k, PERMUTATIONS), a signature resembles."""
    return (others == own).mean(axis=1) >= similarity


def _equal_runs(values: np.ndarray) -> Iterator[np.ndarray]:
    """The places of each value that occurs more than once, ascending."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    edges = np.flatnonzero(ordered[1:] != ordered[:-1]) + 1
    starts, ends = np.concatenate([[0], edges]), np.concatenate([edges, [len(order)]])
    for start, end in zip(starts, ends, strict=True):
        if end - start > 1:
            yield order[start:end]
