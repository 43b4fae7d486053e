"""A corpus with any number of shards that needs the disk space of one: its files are links to one tar and one index.

It is read by the usual code. So it shows the real costs of a corpus of that size: the manifest, the order, the windows,
the indexes. It cannot show the speed of a disk that holds so much data.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np

from data_pipeline.bench.material import bench_tokenizer, write_shard
from data_pipeline.format.extents import file_of, shard_extents, to_bytes
from data_pipeline.format.manifest import ExtentsInfo, Manifest, TokenizerInfo
from data_pipeline.format.shard_table import ShardTable
from data_pipeline.format.shards import ShardIndex

LONGEST = 8192  # maximum tokens of a document


def make_endless(directory: Path, documents: int, per_shard: int, mean: int, linked: bool) -> None:
    """Write the corpus.

    Args:
        documents: of the whole corpus; rounded up to whole shards.
        per_shard: documents of a shard.
        mean: mean tokens of a document. Lengths are log-normal, like those of web pages.
        linked: create the links. `bench.server` does not need them.
    """
    directory.mkdir(parents=True)
    rng = np.random.Generator(np.random.Philox(key=1))
    lengths = np.clip(rng.lognormal(np.log(mean) - 0.5, 1.0, min(per_shard, documents)), 2, LONGEST).astype(int)
    info = write_shard(directory, 0, lengths.tolist(), rng)
    count = -(-documents // len(lengths))
    names = [f"train-{number:06d}" for number in range(count)]
    if linked:
        for name in names[1:]:
            for ending in (".tar", ".idx", ".tokens"):
                if (directory / f"{names[0]}{ending}").exists():
                    (directory / f"{name}{ending}").symlink_to(f"{names[0]}{ending}")
    columns = {
        name: np.array([value.encode() if isinstance(value, str) else value] * count)
        for name, value in info.model_dump().items()
    }
    columns |= {
        field: np.array([f"{name}{ending}".encode() for name in names])
        for field, ending in (("file", ".tar"), ("index", ".idx"))
    }
    data = to_bytes([shard_extents(ShardIndex.read(directory / info.index).lengths)] * count)
    (directory / file_of("train")).write_bytes(data)
    tokenizer = bench_tokenizer()
    (directory / tokenizer.file).write_bytes(tokenizer.model)
    ids = {name: getattr(tokenizer, name) for name in ("vocab_size", "bos_id", "eos_id", "pad_id", "sha256")}
    Manifest(
        tokenizer=TokenizerInfo(file=tokenizer.file, **ids),
        dtype="uint16",
        splits={"train": ShardTable.of(columns), "validation": ShardTable()},
        extents={"train": ExtentsInfo(file=file_of("train"), sha256=hashlib.sha256(data).hexdigest())},
        provenance={"made_of": "one shard of random tokens, again and again, for bst bench index"},
        licences={},
    ).write(directory)
    (directory / "shape.json").write_text(json.dumps({"shards": count, "documents": count * len(lengths)}))
