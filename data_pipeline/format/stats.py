"""Statistics of a prepared corpus: document lengths, and how much of a held-out split is repeated in train.

Overlap is measured in runs of `NGRAM` tokens. A sample of the runs in validation (and test) is kept. It is chosen by
hash, so the choice does not depend on where a run occurs. Then train is scanned once for these runs. The size of the
sample limits the memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_pipeline.format.manifest import Manifest
from data_pipeline.format.shard_table import ShardInfo
from data_pipeline.format.shards import ShardIndex, read_shard

NGRAM = 32
"""Tokens of a run: about 100 characters of English or code. Runs of this length rarely repeat by chance."""

_SAMPLE = 1 << 21  # hashes of runs kept for each held-out split: 16 MB
_BASE = 0x9E3779B97F4A7C15  # odd: multiplication by it is a bijection modulo 2**64
_MIX = np.uint64(0xBF58476D1CE4E5B9)


class Overlap(NamedTuple):
    """How much of a held-out split is repeated in train."""

    runs: int  # distinct runs of NGRAM tokens that were searched for
    found: int  # how many of these runs occur in train
    documents: int  # documents long enough to hold a run
    mostly_found: int  # how many of these documents have more than half of their runs in train


class ScanTask(NamedTuple):
    """The data that a worker needs to scan one shard for runs."""

    tar: Path
    wanted: np.ndarray  # (runs,) uint64, sorted


class Scan(NamedTuple):
    """The result of scanning one shard."""

    found: np.ndarray  # (hits,) uint64: the wanted runs that occur in it
    documents: np.ndarray  # (documents,) uint64: a hash of each document's tokens


def document_lengths(corpus: Path, shards: Iterable[ShardInfo]) -> np.ndarray:
    """Return (documents,) int64: the tokens of every document of the shards, from their indexes."""
    lengths = [ShardIndex.read(corpus / shard.index).lengths.astype(np.int64) for shard in shards]
    return np.concatenate([*lengths, np.empty(0, np.int64)])


def length_histogram(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the counts of documents by powers of two: (edges (k+1,), counts (k,)), edges[i] <= length < edges[i+1]."""
    top = int(lengths.max()).bit_length()
    bottom = int(lengths.min()).bit_length() - 1
    edges = 2 ** np.arange(bottom, top + 1, dtype=np.int64)
    return edges, np.histogram(lengths, bins=edges)[0]


def run_hashes(tokens: np.ndarray, n: int = NGRAM) -> np.ndarray:
    """Return (len(tokens) - n + 1,) uint64: a hash of every run of `n` tokens; `n` is a power of two.

    The polynomial hash of a run is computed from those of its halves, in log2(n) passes over the tokens.
    """
    hashes = tokens.astype(np.uint64) + np.uint64(1)
    width, power = 1, _BASE
    while width < n:
        if len(hashes) <= width:
            return np.empty(0, np.uint64)
        hashes = hashes[:-width] * np.uint64(power) + hashes[width:]
        width, power = 2 * width, power * power % 2**64
    hashes = (hashes ^ (hashes >> np.uint64(31))) * _MIX
    return hashes ^ (hashes >> np.uint64(29))


def sample_runs(corpus: Path, shards: Iterable[ShardInfo]) -> np.ndarray:
    """Return (runs,) uint64: the sorted distinct hashes of runs in the shards; the smallest ones if too many."""
    kept, bound = np.empty(0, np.uint64), np.uint64(2**64 - 1)
    waiting: list[np.ndarray] = []
    size = 0
    for tokens in _documents(corpus / shard.file for shard in shards):
        hashes = run_hashes(tokens)
        waiting.append(hashes[hashes <= bound])
        size += len(waiting[-1])
        if size > _SAMPLE:  # a merge takes time in proportion to the sample, so it is not done for every document
            kept, waiting, size = _merged(kept, waiting), [], 0
            bound = kept[-1] if len(kept) == _SAMPLE else bound
    return _merged(kept, waiting)


def _merged(kept: np.ndarray, more: list[np.ndarray]) -> np.ndarray:
    """Return the `_SAMPLE` smallest of all these hashes, sorted."""
    return np.unique(np.concatenate([kept, *more]))[:_SAMPLE]


def scan_shard(task: ScanTask) -> Scan:
    """Search one shard for the wanted runs."""
    found, documents = [np.empty(0, np.uint64)], []
    for tokens in _documents([task.tar]):
        found.append(np.unique(_among(run_hashes(tokens), task.wanted)))
        documents.append(_hash(tokens))
    return Scan(np.unique(np.concatenate(found)), np.array(documents, np.uint64))


def overlap(corpus: Path, shards: Iterable[ShardInfo], wanted: np.ndarray, found: np.ndarray) -> Overlap:
    """Return the overlap of the held-out shards, given the runs `wanted` and those `found` in train, both sorted."""
    documents = mostly = 0
    for tokens in _documents(corpus / shard.file for shard in shards):
        runs = _among(run_hashes(tokens), wanted)
        if len(runs):
            documents += 1
            mostly += 2 * len(_among(runs, found)) > len(runs)
    return Overlap(len(wanted), len(found), documents, mostly)


def held_out(manifest: Manifest) -> list[str]:
    """Return the splits that train must not repeat."""
    return [split for split, shards in manifest.splits.items() if split != "train" and shards]


def _among(hashes: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return those of `hashes` that are in `wanted`, which is sorted. The order of `hashes` is kept."""
    if not len(wanted):
        return np.empty(0, np.uint64)
    places = np.minimum(np.searchsorted(wanted, hashes), len(wanted) - 1)
    return hashes[wanted[places] == hashes]


def _hash(tokens: np.ndarray) -> int:
    weights = np.multiply.accumulate(np.full(len(tokens), _BASE, np.uint64))
    return int(((tokens.astype(np.uint64) + np.uint64(1)) * weights).sum(dtype=np.uint64))


def _documents(tars: Iterable[Path]) -> Iterator[np.ndarray]:
    for tar in tars:
        with tar.open("rb") as file:
            for _, _, tokens in read_shard(file, str(tar)):
                yield tokens
