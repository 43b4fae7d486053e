"""From the spool to shards: decides which documents are kept, in which split and shard, and writes the shards.

All of this is decided from the table before any text is encoded. So each shard is an independent task whose bytes
depend only on the settings, and a finished shard stays finished when the work is interrupted.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from bst_base.files import atomic_file
from data_pipeline.format.extents import shard_extents
from data_pipeline.format.manifest import sha256_file
from data_pipeline.format.packed import packed_damage, write_packed
from data_pipeline.format.shard_table import ShardInfo
from data_pipeline.format.shards import ShardIndex, ShardWriter
from data_pipeline.format.tokenizer import Tokenizer, read_tokenizer
from data_pipeline.prepare.dedup import Clusters, DedupConfig, near_duplicates
from data_pipeline.prepare.spool import SPLITS, TABLE, read_documents
from data_pipeline.prepare.text import TOKEN
from data_pipeline.sources import Source

PLAN = np.dtype([*((name, TABLE[name]) for name in TABLE.names), ("key", "<u8"), ("cluster", "<u8"), ("shard", "<u4")])
"""A kept document: its row of the table, its key in the corpus, its cluster, and its shard within its split."""
_TOGETHER = 4 << 20  # bytes of text that are encoded with one call
TOKENIZER = "tokenizer"
"""The file name of the tokenizer in the working directory, whatever its kind."""


class Kept(NamedTuple):
    """The decision of deduplication for each document of the table."""

    keep: np.ndarray  # (documents,) bool
    cluster: np.ndarray  # (documents,) uint64: the cluster's name, which stays the same when documents are added
    exact_duplicates: int
    near_duplicates: int


def deduplicate(
    table: np.ndarray, signatures: np.ndarray | None, config: DedupConfig, earlier: np.ndarray | None = None
) -> Kept:
    """Find the duplicates in `table`, (documents,) of TABLE. `signatures` are None unless the method is minhash.

    The first document of a cluster of duplicates is kept. Documents that the source put in test or validation come
    first, so that nothing of these splits is repeated in train. Documents of one group share a cluster, but all are
    kept. `earlier`, (documents,), is the split of documents that are in the corpus which is continued, 0 for other
    documents. They come before all others, since they cannot be removed from that corpus.
    """
    stays = np.zeros(len(table), bool) if earlier is None else earlier > 0
    order = np.lexsort((-table["split"].astype(np.int8), ~stays))  # by split: test, validation, train, undecided
    table = table[order]
    clusters = Clusters(len(table))
    if config.method != "none":
        clusters.join_equal(np.ascontiguousarray(table["digest"]).view("V16")[:, 0])
    exact = clusters.roots()
    if signatures is not None:
        near_duplicates(signatures, order, config, clusters)
    near = clusters.roots()
    grouped = np.flatnonzero(table["group"])
    clusters.join_equal(table["group"][grouped], grouped)
    places = np.arange(len(table))
    keep, cluster = np.empty(len(table), bool), np.empty(len(table), np.uint64)
    keep[order] = near == places
    cluster[order] = _cluster_names(clusters.roots(), table["digest"][:, 0])
    removed_exact = int(np.count_nonzero(exact != places))
    return Kept(keep, cluster, removed_exact, int(np.count_nonzero(near != places)) - removed_exact)


def _cluster_names(roots: np.ndarray, digests: np.ndarray) -> np.ndarray:
    """Name each cluster by the smallest hash of its texts.

    Adding a document changes the name only if it joins the cluster (and then perhaps the split, unless the corpus is
    continued).
    """
    smallest = np.full(len(roots), np.iinfo(np.uint64).max, np.uint64)
    np.minimum.at(smallest, roots, digests)
    return smallest[roots]


def assign(
    table: np.ndarray,
    kept: Kept,
    *,
    validation_fraction: float,
    shard_bytes: int,
    seed: int,
    earlier: np.ndarray | None = None,
    shards: Mapping[int, int] = MappingProxyType({}),
) -> np.ndarray:
    """Return the plan, (kept documents,) of PLAN, sorted by split and then in the order of the corpus.

    If the source gives a document no split, the hash of its cluster decides. If that leaves validation empty, the
    cluster with the smallest hash goes there, so that small corpora have a validation split too.

    `earlier`, as for `deduplicate`: these documents are not planned again, and others of their clusters go to their
    split. `shards`: the number of existing shards, by split.
    """
    earlier = np.zeros(len(table), np.uint8) if earlier is None else earlier
    stays = earlier > 0
    new = kept.keep & ~stays
    plan = np.zeros(int(new.sum()), PLAN)
    for name in TABLE.names:
        plan[name] = table[name][new]
    plan["cluster"] = kept.cluster[new]
    plan["key"] = np.arange(len(plan)) + stays.sum()
    _join_earlier(plan, kept.cluster[stays], earlier[stays])
    undecided = plan["split"] == 0
    names, inverse = np.unique(plan["cluster"][undecided], return_inverse=True)
    uniform = np.array([_uniform(seed, int(name)) for name in names])
    chosen = uniform < validation_fraction
    validated = chosen.any() or (plan["split"] == 2).any() or stays.any()
    if validation_fraction > 0 and len(names) > 1 and not validated:
        chosen[np.argmin(uniform)] = True
    plan["split"][undecided] = np.where(chosen, SPLITS.index("validation"), SPLITS.index("train"))[inverse]
    plan = plan[np.argsort(plan["split"], kind="stable")]
    for split in np.unique(plan["split"]):
        rows = plan["split"] == split
        before = np.cumsum(plan["bytes"][rows]) - plan["bytes"][rows]
        own = np.unique(before // np.uint64(shard_bytes), return_inverse=True)[1]
        plan["shard"][rows] = own + shards.get(int(split), 0)
    return plan


def _join_earlier(plan: np.ndarray, clusters: np.ndarray, splits: np.ndarray) -> None:
    """Put undecided documents into the split of the first earlier document of their cluster.

    `clusters` and `splits`, (n,): those of the earlier documents.
    """
    names, first = np.unique(clusters, return_index=True)
    if not len(names):
        return
    place = np.minimum(np.searchsorted(names, plan["cluster"]), len(names) - 1)
    joins = (plan["split"] == 0) & (names[place] == plan["cluster"])
    plan["split"][joins] = splits[first[place[joins]]]


def _uniform(seed: int, cluster: int) -> float:
    return int.from_bytes(hashlib.sha256(f"split {seed} {cluster}".encode()).digest()[:8], "little") / 2**64


class EncodeTask(NamedTuple):
    """The data that a worker needs to write one shard."""

    output: Path
    work: Path
    split: str
    number: int
    start: int  # rows of work/plan.npy
    stop: int
    source: str
    tokenized: bool


class ShardDone(NamedTuple):
    """A finished shard: its manifest entry, its documents by licence, and its extents (`extents`)."""

    split: str
    number: int
    info: ShardInfo
    licences: dict[str, int]
    extents: list[int]
    was_there: bool


def shard_tasks(plan: np.ndarray, output: Path, work: Path, source: Source) -> list[EncodeTask]:
    """Return one task per shard, in the order of the plan."""
    edges = np.flatnonzero((np.diff(plan["split"]) != 0) | (np.diff(plan["shard"]) != 0)) + 1
    starts, stops = [0, *edges.tolist()], [*edges.tolist(), len(plan)]
    of = (source.kind, source.tokenized)
    return [
        EncodeTask(output, work, SPLITS[plan["split"][start]], int(plan["shard"][start]), start, stop, *of)
        for start, stop in zip(starts, stops, strict=True)
    ]


def write_shard(task: EncodeTask) -> ShardDone:
    """Write a shard, its index and its packed file, and at the end a record that it is done.

    A recorded shard is only checked.
    """
    record = task.work / f"{task.split}-{task.number:06d}.json"
    if done := _finished(record, task):
        return done
    tokenizer = _tokenizer(task.work / TOKENIZER)
    rows = np.load(task.work / "plan.npy", mmap_mode="r")[task.start : task.stop]
    tar = task.output / f"{task.split}-{task.number:06d}.tar"
    licences: Counter[str] = Counter()
    token_bytes, text_bytes = tokenizer.token_bytes, 0
    with atomic_file(tar) as file:
        writer = ShardWriter(file)
        for row, names, data, ids in _encoded(read_documents(task.work / "spool", rows), tokenizer, task.tokenized):
            size = int(token_bytes[ids].sum()) if task.tokenized else len(data)
            tokens = np.append(ids, tokenizer.dtype.type(tokenizer.eos_id))
            writer.add(f"{row['key']:09d}", _document_info(row, names, task.source, len(tokens), size), tokens)
            licences[names["licence"]] += 1
            text_bytes += size
        writer.close()
    index = ShardIndex.build(tar)
    index.write(tar.with_suffix(".idx"))
    write_packed(tar, index)
    info = ShardInfo(
        file=tar.name,
        bytes=index.tar_bytes,
        sha256=index.tar_sha256,
        documents=len(index.lengths),
        tokens=int(index.lengths.sum()),
        text_bytes=text_bytes,
        index=tar.with_suffix(".idx").name,
        index_sha256=sha256_file(tar.with_suffix(".idx")),
    )
    extents = shard_extents(index.lengths)
    done = ShardDone(task.split, task.number, info, dict(sorted(licences.items())), extents, was_there=False)
    with atomic_file(record) as file:
        file.write(json.dumps({"info": info.model_dump(), "licences": done.licences}).encode())
    return done


def _encoded(
    documents: Iterator[tuple[np.void, dict[str, Any], bytes]], tokenizer: Tokenizer, tokenized: bool
) -> Iterator[tuple[np.void, dict[str, Any], bytes, np.ndarray]]:
    """Yield the documents with their ids, (n,): the encoded text, or the ids that the source holds."""
    if tokenized:
        yield from ((*document, np.frombuffer(document[2], TOKEN).astype(tokenizer.dtype)) for document in documents)
        return
    while some := list(_take(documents, _TOGETHER)):
        ids = tokenizer.encode_all([data.decode() for _, _, data in some])
        yield from ((*document, own) for document, own in zip(some, ids, strict=True))


def _take(
    documents: Iterator[tuple[np.void, dict[str, Any], bytes]], size: int
) -> Iterator[tuple[np.void, dict[str, Any], bytes]]:
    """Yield the next documents, of about `size` bytes together."""
    while size > 0 and (document := next(documents, None)):
        yield document
        size -= len(document[2])


def _document_info(row: np.void, names: dict[str, Any], source: str, tokens: int, size: int) -> dict[str, Any]:
    return {
        "id": int(row["id"]),
        "path": names["path"],
        **({"title": names["title"]} if names["title"] else {}),
        "n_tokens": tokens,
        "n_bytes": size,
        "source": source,
        "licence": names["licence"],
        **({"meta": names["meta"]} if "meta" in names else {}),
        "dedup_cluster": f"{row['cluster']:016x}",
    }


def _finished(record: Path, task: EncodeTask) -> ShardDone | None:
    """Return the shard if an earlier run finished it and its files are unchanged, else None.

    A damaged packed file is written again.
    """
    if not record.exists():
        return None
    found = json.loads(record.read_bytes())
    info = ShardInfo(**found["info"])
    tar, index = task.output / info.file, task.output / info.index
    if not (tar.exists() and index.exists()):
        return None
    if sha256_file(tar) != info.sha256 or sha256_file(index) != info.index_sha256:
        return None
    read = ShardIndex.read(index)
    if packed_damage(tar, read):
        write_packed(tar, read)
    extents = shard_extents(read.lengths)
    return ShardDone(task.split, task.number, info, found["licences"], extents, was_there=True)


@lru_cache(maxsize=1)
def _tokenizer(path: Path) -> Tokenizer:
    return read_tokenizer(path)
