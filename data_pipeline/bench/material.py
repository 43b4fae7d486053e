"""The same sequences in the format of each reader.

Our corpus holds documents. The loader cuts them into sequences of L + 1 tokens, which the other packages store one by
one. So all readers serve the same sequences. The others cannot serve any other length.
"""

from __future__ import annotations

import hashlib
import io
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bst_base.files import atomic_directory
from data_pipeline.format.manifest import Manifest, TokenizerInfo
from data_pipeline.format.packed import write_packed
from data_pipeline.format.shard_table import ShardInfo
from data_pipeline.format.shards import ShardIndex, ShardWriter
from data_pipeline.format.tokenizer import Tokenizer, TokenizerConfig, parse_tokenizer, train_tokenizer
from data_pipeline.serve.order.stream import TokenStream
from data_pipeline.serve.reader import Corpus

MEAN_DOCUMENT = 65_536
"""Default mean tokens of a document: a source file tree or a long article. Books are longer, web pages shorter."""
SHARD_TOKENS = 32 << 20
VOCABULARY = 32_000
PER_TAR = 4096  # sequences in one WebDataset tar


def make_ours(directory: Path, sequences: int, length: int, mean_document: int = MEAN_DOCUMENT) -> None:
    """Write a corpus of random tokens with exactly `sequences` sequences of `length` in a pass.

    It has one more token, the last label. The lengths of documents are log-normal, with a mean of `mean_document`
    tokens.
    """
    total = sequences * length + 1
    rng = np.random.Generator(np.random.Philox(key=1))
    count = 4 * total // mean_document + 4
    lengths = np.maximum(rng.lognormal(np.log(mean_document) - 0.5, 1.0, count), 2).astype(int)
    ends = np.cumsum(lengths)
    lengths = lengths[: int(np.searchsorted(ends, total)) + 1]
    lengths[-1] -= int(ends[len(lengths) - 1]) - total
    with atomic_directory(directory) as partial:
        tokenizer = bench_tokenizer()
        (partial / tokenizer.file).write_bytes(tokenizer.model)
        parts = np.array_split(lengths, -(-total // SHARD_TOKENS))
        shards = [write_shard(partial, number, part.tolist(), rng) for number, part in enumerate(parts)]
        ids = {name: getattr(tokenizer, name) for name in ("vocab_size", "bos_id", "eos_id", "pad_id", "sha256")}
        Manifest(
            tokenizer=TokenizerInfo(file=tokenizer.file, **ids),
            dtype="uint16",
            splits={"train": tuple(shards), "validation": ()},
            provenance={"made_of": "random tokens, for bst bench data"},
            licences={},
        ).write(partial)


def sequences_of(directory: Path, length: int) -> Iterator[np.ndarray]:
    """Yield (length + 1,) uint16: the sequences of the first pass with seed 0 over our corpus, in stream order."""
    corpus = Corpus.open(str(directory))
    stream = TokenStream(corpus.lengths, None, ("documents", 0, 0, 0))
    for start in range(0, stream.total - 1, length):
        pieces = stream.pieces(np.array([start]), length + 1)
        row = np.empty(length + 1, np.uint16)
        for slot, count, document, offset in zip(
            pieces.slot, pieces.length, pieces.document, pieces.offset, strict=True
        ):
            corpus.read_into(int(document), int(offset), memoryview(row[slot : slot + count]).cast("B"))
        yield row


def make_webdataset(ours: Path, directory: Path, length: int) -> None:
    """Write one tar member per sequence, in tars of `PER_TAR`."""
    with atomic_directory(directory) as partial:
        tar = None
        for number, row in enumerate(sequences_of(ours, length)):
            if number % PER_TAR == 0:
                if tar:
                    tar.close()
                tar = tarfile.open(partial / f"{number // PER_TAR:04d}.tar", "w")  # noqa: SIM115
            payload = io.BytesIO()
            np.save(payload, row)
            member = tarfile.TarInfo(f"{number:08d}.tok.npy")
            member.size = len(payload.getvalue())
            tar.addfile(member, io.BytesIO(payload.getvalue()))
        tar.close()


def make_litdata(ours: Path, directory: Path, length: int) -> None:
    """Write chunks of tokens with litdata's own writer, for its TokensLoader."""
    import torch
    from litdata.streaming import Cache, TokensLoader

    shutil.rmtree(directory, ignore_errors=True)
    cache = Cache(str(directory), chunk_bytes="64MB", item_loader=TokensLoader(block_size=length + 1))
    for number, row in enumerate(sequences_of(ours, length)):
        cache[number] = torch.from_numpy(row)
    cache.done()
    cache.merge()


def make_mosaicml(ours: Path, directory: Path, length: int) -> None:
    """Write MDS shards of fixed-size arrays, the fastest encoding of mosaicml-streaming."""
    from streaming import MDSWriter

    shutil.rmtree(directory, ignore_errors=True)
    with MDSWriter(out=str(directory), columns={"tokens": f"ndarray:uint16:{length + 1}"}, size_limit="64mb") as writer:
        for row in sequences_of(ours, length):
            writer.write({"tokens": row})


def bench_tokenizer() -> Tokenizer:
    """Return a small tokenizer. A corpus needs one, although these documents are not text."""
    words = "".join(f"word{i} = other{i * 7 % 97} + {i}\n" for i in range(400))
    return parse_tokenizer(train_tokenizer([words], TokenizerConfig(vocab_size=400)))


def write_shard(directory: Path, number: int, lengths: list[int], rng: np.random.Generator) -> ShardInfo:
    """Write a shard of random tokens like `prepare`: with an index, and with a packed file if documents are short."""
    tar, idx = directory / f"train-{number:06d}.tar", directory / f"train-{number:06d}.idx"
    with tar.open("wb") as file:
        writer = ShardWriter(file)
        for place, length in enumerate(lengths):
            tokens = rng.integers(4, VOCABULARY, length, dtype=np.uint16)
            writer.add(f"{number:06d}{place:06d}", {"id": place, "n_tokens": length}, tokens)
        writer.close()
    index = ShardIndex.build(tar)
    index.write(idx)
    write_packed(tar, index)
    return ShardInfo(
        file=tar.name,
        bytes=index.tar_bytes,
        sha256=index.tar_sha256,
        documents=len(lengths),
        tokens=sum(lengths),
        text_bytes=0,
        index=idx.name,
        index_sha256=hashlib.sha256(idx.read_bytes()).hexdigest(),
    )
