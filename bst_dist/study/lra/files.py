"""Readers of the published files: Text (IMDb), Retrieval (AAN), Image (CIFAR-10). `released.py` has the others.

Each reader yields the examples of a split as ``(sequences, class)``. Symbols are 0..255: bytes of text or grey values.
A missing or damaged file raises FileProblem, with the expected file and its source.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from bst_base.documented import documentation
from bst_base.errors import UserError
from bst_base.settings import Config
from data_pipeline.serve.order.permutation import Permutation

Example: TypeAlias = tuple[list[np.ndarray], int]

GREY = np.array([299, 587, 114])
"""Weights of red, green and blue in a grey value, in thousandths (ITU-R BT.601, as in the Long Range Arena)."""
SIDE = 32
"""Width and height of a CIFAR-10 image in pixels."""


class FileProblem(UserError):
    """A published file is missing, or has unexpected contents."""


class TextConfig(Config):
    """Film reviews, positive or negative (Maas et al. 2011): 25,000 for training and validation, 25,000 to test."""

    task: Literal["text"] = "text"
    source: Path
    """The directory aclImdb, as it is unpacked from aclImdb_v1.tar.gz (ai.stanford.edu/~amaas/data/sentiment)."""


class RetrievalConfig(Config):
    """Pairs of papers of which one cites the other or not (ACL Anthology Network, Radev et al. 2009)."""

    task: Literal["retrieval"] = "retrieval"
    source: Path
    """The directory with new_aan_pairs.{train,eval,test}.tsv, as in lra_release/tsv_data of the benchmark's release
    (github.com/google-research/long-range-arena)."""


class ImageConfig(Config):
    """Grey CIFAR-10 pixels (Krizhevsky 2009): 45,000 images for training, 5,000 for validation, 10,000 for the test."""

    task: Literal["image"] = "image"
    source: Path
    """The directory cifar-10-batches-py or cifar-10-batches-bin (www.cs.toronto.edu/~kriz/cifar.html)."""


def text(config: TextConfig, split: str) -> Iterator[Example]:
    """Yield reviews as bytes; class 1 is positive. A fixed random tenth of the training reviews is for validation.

    (The Long Range Arena itself validates on the test split.)
    """
    reviews = _reviews(config.source, "test" if split == "test" else "train")
    held_out = len(reviews) // 10
    if split == "train":
        reviews = reviews[held_out:]
    elif split == "validation":
        reviews = reviews[:held_out]
    for path, label in reviews:
        content = _read(path, config)
        if not content:
            raise problem(config, path, "is empty")
        yield [np.frombuffer(content, np.uint8)], label


def _reviews(source: Path, part: str) -> list[tuple[Path, int]]:
    """Return files and classes of IMDb's train or test part, in a fixed random order independent of the file system."""
    found = []
    for name, label in (("neg", 0), ("pos", 1)):
        files = sorted((source / part / name).glob("*.txt"))
        if not files:
            raise FileProblem(f"{source / part / name}: no *.txt there; {expected(TextConfig)}")
        found += [(path, label) for path in files]
    order = Permutation(len(found), "lra-text", 0)(np.arange(len(found)))
    return [found[place] for place in order.tolist()]


def retrieval(config: RetrievalConfig, split: str) -> Iterator[Example]:
    """Yield two papers as bytes; class 1 is a citation. File lines are tab-separated ``label, id, id, text, text``."""
    path = config.source / f"new_aan_pairs.{'eval' if split == 'validation' else split}.tsv"
    if not path.is_file():
        raise problem(config, path, "no such file")
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            fields = line.rstrip(b"\r\n").split(b"\t")
            if len(fields) != 5 or fields[0] not in (b"0.0", b"1.0", b"0", b"1") or not (fields[3] and fields[4]):
                raise problem(config, path, f"line {number} is not 'label, id, id, text, text' between tabs")
            yield [np.frombuffer(field, np.uint8) for field in fields[3:]], int(fields[0][:1])


def image(config: ImageConfig, split: str) -> Iterator[Example]:
    """Yield grey values row by row, (1024,). The last tenth of the training images, as ordered, is for validation."""
    names = ["test_batch"] if split == "test" else [f"data_batch_{number}" for number in range(1, 6)]
    batches = [_batch(config, name) for name in names]
    pixels = np.concatenate([pixels for pixels, _ in batches])
    labels = np.concatenate([labels for _, labels in batches])
    last = len(labels) - len(labels) // 10
    wanted = {"train": slice(None, last), "validation": slice(last, None), "test": slice(None)}[split]
    for colours, label in zip(pixels[wanted], labels[wanted], strict=True):
        yield [(GREY @ colours.reshape(3, -1).astype(np.int64) // 1000).astype(np.uint8)], int(label)


def _batch(config: ImageConfig, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return pixels (n, 3072), first all red, then all green, then all blue, and classes (n,) of a batch file."""
    binary, pickled = config.source / f"{name}.bin", config.source / name
    path = binary if binary.is_file() else pickled
    if not path.is_file():
        raise problem(config, pickled, "no such file (nor with .bin)")
    read = _binary_batch if path is binary else _pickled_batch
    try:
        pixels, labels = read(_read(path, config))
    except (ValueError, KeyError, TypeError, EOFError, AttributeError, IndexError, pickle.UnpicklingError) as error:
        raise problem(config, path, f"is no batch of CIFAR-10: {error}") from None
    if pixels.shape != (len(labels), 3 * SIDE * SIDE) or not len(labels) or labels.max() > 9:
        raise problem(config, path, f"is no batch of CIFAR-10: pixels {pixels.shape}, {len(labels)} classes")
    return pixels, labels


def _binary_batch(content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Read the binary format: for each image one byte with its class, then its pixels."""
    rows = np.frombuffer(content, np.uint8).reshape(-1, 1 + 3 * SIDE * SIDE)
    return rows[:, 1:], rows[:, 0]


def _pickled_batch(content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Read the Python format: a dict of byte strings, pickled by Python 2."""
    batch = _ArraysOnly(content).load()
    return np.asarray(batch[b"data"], np.uint8), np.asarray(batch[b"labels"], np.int64)


class _ArraysOnly(pickle.Unpickler):
    """An unpickler of plain values and arrays only, because a downloaded pickle could otherwise run any code."""

    ALLOWED = frozenset(
        [("_codecs", "encode")]
        + [(f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")]
        + [("numpy", "ndarray"), ("numpy", "dtype")]
    )

    def __init__(self, content: bytes) -> None:
        import io

        super().__init__(io.BytesIO(content), encoding="bytes")

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed in it")
        return super().find_class(module, name)


def _read(path: Path, config: Config) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise problem(config, path, f"cannot be read: {error.strerror}") from None


def problem(config: Config, path: Path, what: str) -> FileProblem:
    """Return an error about a file, with a description of the expected `source`."""
    return FileProblem(f"{path}: {what}; {expected(type(config))}")


def expected(cls: type[Config]) -> str:
    """Return a description of the expected `source`, from its docstring."""
    text = documentation(cls)["source"].rstrip(".")
    return f"source should be {text[0].lower()}{text[1:]}"
