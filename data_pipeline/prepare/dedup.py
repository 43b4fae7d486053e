"""Which documents say the same, exactly or nearly: what is kept, and which documents must share a split.

Near duplicates are found by MinHash (Broder 1997) with banding: documents whose signatures agree in any whole band are
compared, and count as the same when the share of equal signature entries, an unbiased estimate of the Jaccard
similarity of their sets of word 5-grams, reaches the threshold. The hash family and the choice of bands are
datasketch's; the bands are compared one at a time over a file of signatures, so memory is a few numbers a document.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from typing import Literal

import numpy as np
from datasketch import MinHash, MinHashLSH
from pydantic import Field

from bst_base.settings import Config

PERMUTATIONS = 128
"""Entries of a signature: a standard error of at most 0.044 on the similarity."""

_SHINGLE = 5  # words
_BATCH = 1 << 15  # shingles hashed at a time: bounds memory to a few tens of MB
_SLICE = 1 << 22  # bytes split into words at a time
_SPACE = re.compile(rb"\s")
_WORD = re.compile(rb"\w+|[^\w\s]+")
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


class DedupConfig(Config):
    """What counts as a duplicate; of the documents that say the same the first is kept."""

    method: Literal["none", "exact", "minhash"] = "minhash"
    """`exact`: equal text; `minhash`: also texts whose word 5-grams mostly agree."""
    similarity: float = Field(0.8, gt=0.0, lt=1.0)
    """Estimated Jaccard similarity from which `minhash` takes two texts for the same."""


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
    """The MinHash signature of a text's word 5-grams, (PERMUTATIONS,) uint32; a shorter text is one shingle."""
    words = np.concatenate([np.empty(0, np.uint64), *_word_hashes(text.lower())])
    width = min(_SHINGLE, max(len(words), 1))
    shingles = np.zeros(max(len(words) - width + 1, 1), np.uint64)
    for k in range(width if len(words) else 0):
        shingles = (shingles ^ words[k : k + len(shingles)]) * _MULTIPLIER
        shingles ^= shingles >> np.uint64(29)
    shingles = np.unique(shingles >> np.uint64(32))
    minhash = MinHash(num_perm=PERMUTATIONS, hashfunc=int)
    for start in range(0, len(shingles), _BATCH):
        minhash.update_batch(shingles[start : start + _BATCH])
    return minhash.hashvalues.astype(np.uint32)


def _word_hashes(text: bytes) -> Iterator[np.ndarray]:
    """Hashes of the text's words, (k,) uint64 a slice; slices end between words."""
    start = 0
    while start < len(text):
        end = _SPACE.search(text, start + _SLICE)
        stop = end.start() if end else len(text)
        yield np.fromiter(map(zlib.crc32, _WORD.findall(text, start, stop)), np.uint64)
        start = stop


def near_duplicates(signatures: np.ndarray, order: np.ndarray, config: DedupConfig, clusters: Clusters) -> None:
    """Join the documents whose `signatures`, (n, PERMUTATIONS) uint32, say they are near duplicates.

    `clusters` counts documents in `order`, (n,): its document i has the signature `order[i]`.
    """
    scheme = MinHashLSH(threshold=config.similarity, num_perm=PERMUTATIONS)
    for band in range(scheme.b):
        columns = np.ascontiguousarray(signatures[:, band * scheme.r : (band + 1) * scheme.r])[order]
        for run in _equal_runs(columns.view(f"V{columns.itemsize * scheme.r}")[:, 0]):
            _join_similar(run, signatures, order, config.similarity, clusters)


def _join_similar(
    run: np.ndarray, signatures: np.ndarray, order: np.ndarray, similarity: float, clusters: Clusters
) -> None:
    """Join each document of a bucket to the first one before it that it resembles."""
    leaders: list[int] = []
    for i in run.tolist():
        for leader in leaders:
            equal = signatures[order[i]] == signatures[order[leader]]
            if clusters.root(i) == clusters.root(leader) or np.mean(equal) >= similarity:
                clusters.join(leader, i)
                break
        else:
            leaders.append(i)


def _equal_runs(values: np.ndarray) -> Iterator[np.ndarray]:
    """The places of each value that occurs more than once, ascending."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    edges = np.flatnonzero(ordered[1:] != ordered[:-1]) + 1
    starts, ends = np.concatenate([[0], edges]), np.concatenate([edges, [len(order)]])
    for start, end in zip(starts, ends, strict=True):
        if end - start > 1:
            yield order[start:end]
