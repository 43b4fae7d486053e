"""Exports a corpus in other formats: Megatron-LM's indexed data sets, and Parquet."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bst_base.errors import UserError
from bst_base.files import atomic_file
from data_pipeline.format.manifest import Manifest, sha256_file
from data_pipeline.format.megatron import write_index
from data_pipeline.format.shard_table import ShardInfo
from data_pipeline.format.shards import ShardError, read_shard
from data_pipeline.format.tokenizer import read_tokenizer

_ROWS_BYTES = 32 << 20  # bytes of tokens in a Parquet row group, so that readers can read the file in pieces
_FACTS = ("path", "title", "source", "licence", "dedup_cluster")


class ExportTask(NamedTuple):
    """The data that a worker needs to write its part of an export."""

    corpus: Path
    output: Path
    split: str
    number: int
    """The shard's number in its split. The Parquet export writes one file per shard."""


class Exported(NamedTuple):
    """The result of an export task."""

    split: str
    documents: int
    tokens: int


def write_megatron(task: ExportTask) -> Exported:
    """Write a split as `<split>.bin` and `<split>.idx`. Each document is one sequence, including the id that ends it.

    Raises UserError for a document of 2^31 tokens or more, whose length does not fit into the format.
    """
    manifest = Manifest.read(task.corpus)
    # Megatron has no unsigned 32-bit type. Ids are below 2^31, so a signed one holds them.
    dtype = np.dtype("<u2") if manifest.token_dtype.itemsize == 2 else np.dtype("<i4")
    lengths: list[int] = []
    with atomic_file(task.output / f"{task.split}.bin") as file:
        for shard in manifest.shards(task.split):
            for info, tokens in _documents(task.corpus, shard):
                if len(tokens) >= 1 << 31:
                    raise UserError(f"{info['path']}: {len(tokens):,} tokens; Megatron's format holds fewer than 2^31")
                file.write(tokens.astype(dtype).tobytes())
                lengths.append(len(tokens))
    write_index(task.output / f"{task.split}.idx", lengths, dtype)
    return Exported(task.split, len(lengths), sum(lengths))


def write_parquet(task: ExportTask) -> Exported:
    """Write a shard as a Parquet file, one document per row: its text and metadata. If it has no text, its ids."""
    import pyarrow  # imported late: it takes as long as all other imports together
    import pyarrow.parquet

    manifest = Manifest.read(task.corpus)
    shards, tokenizer = manifest.shards(task.split), read_tokenizer(task.corpus / manifest.tokenizer.file)
    content = ("text", pyarrow.large_string()) if tokenizer.has_text else ("input_ids", pyarrow.list_(pyarrow.int32()))
    schema = pyarrow.schema(
        [content, *((name, pyarrow.string()) for name in (*_FACTS, "meta")), ("id", pyarrow.uint64())]
    )
    documents = total = size = 0
    rows: list[dict[str, Any]] = []
    name = f"{task.split}-{task.number:05d}-of-{len(shards):05d}.parquet"
    with atomic_file(task.output / name) as file, pyarrow.parquet.ParquetWriter(file, schema) as table:
        for info, tokens in _documents(task.corpus, shards[task.number]):
            own = tokens[:-1]  # without the end-of-document token
            rows.append(_row(info) | {content[0]: tokenizer.decode(own) if tokenizer.has_text else own})
            documents, total, size = documents + 1, total + len(tokens), size + tokens.nbytes
            if size >= _ROWS_BYTES:
                table.write_table(pyarrow.Table.from_pylist(rows, schema))
                rows, size = [], 0
        table.write_table(pyarrow.Table.from_pylist(rows, schema))
    return Exported(task.split, documents, total)


def _row(info: dict[str, Any]) -> dict[str, Any]:
    meta = json.dumps(info["meta"], ensure_ascii=False, sort_keys=True) if "meta" in info else None
    return {name: info.get(name) for name in (*_FACTS, "id")} | {"meta": meta}


def _documents(corpus: Path, shard: ShardInfo) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """Yield (JSON, tokens) of each document of a shard. The shard is first compared with its hash."""
    path = corpus / shard.file
    if not path.exists():
        raise ShardError(f"{path}: the shard is missing; copy it again, or prepare the corpus again")
    if sha256_file(path) != shard.sha256:
        raise ShardError(f"{path}: not what was written: 'bst data verify {corpus}' says where; copy it again")
    with path.open("rb") as file:
        for _, info, tokens in read_shard(file, str(path)):
            yield info, tokens
