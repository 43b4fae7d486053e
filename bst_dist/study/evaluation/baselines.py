"""Two baselines for a model on the same text: an order-2 byte model and xz -9.

    bst baselines corpora/stdlib

The byte model is trained on the training text. It codes the validation text document by document and includes the end
of each document, so its bits per byte are comparable with those of a language model. xz sees only the validation text,
as one stream: it is not trained in advance but can refer to all earlier text.
"""

from __future__ import annotations

import argparse
import lzma
import time
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from rich.console import Console

from bst_base.terminal import Sheet, print_table
from bst_dist.study.statistics import Estimate, ratio
from data_pipeline.serve.reader import Corpus

END = 256
"""The symbol after the last byte of a document and before its first byte."""
SYMBOLS = 257
_BATCH = 1 << 22  # number of symbols counted at a time


class Order2:
    """A model that predicts each byte from the two bytes before it, smoothed by interpolation with shorter contexts.

    Witten and Bell 1991 (method C of PPM): ``p(b | c) = (n(c, b) + t(c) p(b | shorter c)) / (n(c) + t(c))``. n are
    counts, t is the number of different symbols seen after c. Order 0 is interpolated with the uniform distribution.
    """

    def __init__(self, documents: Iterable[bytes]):
        """Count the symbols of the training documents. The 257^3 counts take about 140 MB."""
        self.counts = np.zeros((SYMBOLS, SYMBOLS, SYMBOLS), np.int64)
        for codes in _batched(_codes(text) for text in documents):
            self.counts += np.bincount(codes, minlength=SYMBOLS**3).reshape(self.counts.shape)
        order1 = self.counts.sum(0)
        order0 = order1.sum(0)
        shorter = _interpolate(order0[None], np.full((1, SYMBOLS), 1 / SYMBOLS))[0]
        self._order1 = _interpolate(order1, shorter[None])
        self._seen = self.counts.sum(-1)
        self._kinds = (self.counts > 0).sum(-1)

    def bits(self, text: bytes) -> float:
        """Return the code length of one document and its end symbol in bits."""
        c2, c1, b = np.unravel_index(_codes(text), self.counts.shape)
        seen, kinds = self._seen[c2, c1], self._kinds[c2, c1]
        mixed = (self.counts[c2, c1, b] + kinds * self._order1[c1, b]) / np.maximum(seen + kinds, 1)
        return float(-np.log2(np.where(seen > 0, mixed, self._order1[c1, b])).sum())


def _interpolate(counts: np.ndarray, shorter: np.ndarray) -> np.ndarray:
    """Return probabilities (c, b) from counts (c, b) and the probabilities of the shorter context, (1 or c, b)."""
    seen, kinds = counts.sum(-1, keepdims=True), (counts > 0).sum(-1, keepdims=True)
    return np.where(seen > 0, (counts + kinds * shorter) / np.maximum(seen + kinds, 1), shorter)


def _codes(text: bytes) -> np.ndarray:
    """Return, for each symbol of a document of n bytes, one number for it and the two symbols before it; (n + 1,)."""
    symbols = np.full(len(text) + 3, END, np.int64)
    symbols[2:-1] = np.frombuffer(text, np.uint8)
    return (symbols[:-2] * SYMBOLS + symbols[1:-1]) * SYMBOLS + symbols[2:]


def _batched(arrays: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield the arrays concatenated into batches of about _BATCH numbers, because each count has a fixed cost."""
    held, size = [], 0
    for array in arrays:
        held.append(array)
        size += len(array)
        if size >= _BATCH:
            yield np.concatenate(held)
            held, size = [], 0
    if held:
        yield np.concatenate(held)


def xz_bytes(documents: Iterable[bytes]) -> int:
    """Return the size of the concatenated documents compressed by `xz -9` (not extreme; needs 674 MiB of memory)."""
    compressor = lzma.LZMACompressor(preset=9)
    return sum(len(compressor.compress(text)) for text in documents) + len(compressor.flush())


def texts(corpus: Corpus) -> Iterator[bytes]:
    """Yield the UTF-8 text of every document of a corpus split, decoded without loss from its tokens."""
    tokenizer = corpus.tokenizer()
    for document in range(len(corpus)):
        yield tokenizer.decode(corpus.document(document)).encode()


def order2_bits_per_byte(training: Iterable[bytes], held_out: list[bytes]) -> Estimate:
    """Return bits per byte of held-out documents under the byte model of the training documents."""
    model = Order2(training)
    return ratio(np.array([model.bits(text) for text in held_out]), np.array([len(text) for text in held_out]))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("corpus", metavar="CORPUS", help="directory or URL of a prepared corpus")
    parser.add_argument("--split", default="validation", help="the text to code (default: %(default)s)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    started = time.perf_counter()
    console = Console()
    with console.status("reading the text back from its tokens"):
        held_out = list(texts(Corpus.open(args.corpus, args.split)))
    size = sum(map(len, held_out))
    with console.status("counting the training text"):
        order2 = order2_bits_per_byte(texts(Corpus.open(args.corpus, "train")), held_out)
    with console.status("xz -9"):
        xz = Estimate(8 * xz_bytes(held_out) / size, None)
    title = f"{args.split} text of {args.corpus}: {len(held_out):,} documents, {size:,} bytes"
    rows = [["order-2 byte model, trained on the training text", str(order2)], ["xz -9, this text alone", str(xz)]]
    print_table(Sheet(("", "bits per byte"), rows), title)
    return {
        "corpus": str(args.corpus),
        "split": args.split,
        "documents": len(held_out),
        "bytes": size,
        **order2.report("order2_bits_per_byte"),
        "xz9_bits_per_byte": xz.value,
        "time_s": time.perf_counter() - started,
    }
