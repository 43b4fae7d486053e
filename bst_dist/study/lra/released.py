"""Readers of the Long Range Arena's released files of ListOps and Pathfinder (lra_release.gz).

github.com/google-research/long-range-arena: ListOps are tables (lra_benchmarks/data/listops.py writes them), Pathfinder
are PNG images with lists of them (lra_benchmarks/data/pathfinder.py reads them). Examples are as in `files.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, UnidentifiedImageError

from bst_base.settings import Config
from bst_dist.study.lra.files import Example, FileProblem, expected, problem
from bst_dist.study.lra.listops import SYMBOLS
from data_pipeline.serve.order.permutation import Permutation

LEVELS = {"easy": "curv_baseline", "intermediate": "curv_contour_length_9", "hard": "curv_contour_length_14"}
"""Level -> folder of Pathfinder images with paths of this length. Published accuracies are those of `hard`."""


class ReleasedListOpsConfig(Config):
    """The released expressions: 96,000 for training, 2,000 for validation, 2,000 for the test."""

    task: Literal["listops"] = "listops"
    source: Path
    """The directory with basic_train.tsv, basic_val.tsv and basic_test.tsv, as in listops-1000 of the benchmark's
    release (github.com/google-research/long-range-arena)."""


class ReleasedPathfinderConfig(Config):
    """The released images: eight tenths for training, one tenth for validation, one tenth for the test."""

    task: Literal["pathfinder"] = "pathfinder"
    source: Path
    """The directory pathfinder32, pathfinder64, pathfinder128 (Pathfinder-X) or pathfinder256 of the benchmark's
    release (github.com/google-research/long-range-arena)."""
    level: Literal["easy", "intermediate", "hard"] = "hard"
    """How long the paths are: curv_baseline, curv_contour_length_9 or curv_contour_length_14 in `source`."""


def listops(config: ReleasedListOpsConfig, split: str) -> Iterator[Example]:
    """Yield expressions as symbols of `listops.SYMBOLS`. Parentheses only mark the tree and are left out, as by the
    benchmark's tokenizer."""
    path = config.source / f"basic_{'val' if split == 'validation' else split}.tsv"
    if not path.is_file():
        raise problem(config, path, "no such file")
    numbers = {symbol: number for number, symbol in enumerate(SYMBOLS)}
    with path.open(encoding="utf-8") as file:
        if file.readline().split() != ["Source", "Target"]:
            raise problem(config, path, "line 1 is not 'Source, Target' between tabs")
        for number, line in enumerate(file, 2):
            source, _, target = line.rstrip("\n").partition("\t")
            symbols = [numbers.get(token) for token in source.split() if token not in ("(", ")")]
            if not symbols or None in symbols or target not in SYMBOLS[:10]:
                raise problem(config, path, f"line {number} is not 'expression, value' between a tab")
            yield [np.array(symbols, np.uint8)], int(target)


def pathfinder(config: ReleasedPathfinderConfig, split: str) -> Iterator[Example]:
    """Yield grey values row by row; class 1: the two dots are on the same path.

    The release has no splits: all images, in a fixed random order, are split at eight and nine tenths. Empty files, of
    which the release has at least one, are left out, as in the benchmark itself.
    """
    images = _listed(config)
    order = Permutation(len(images), "lra-pathfinder", 0)(np.arange(len(images)))
    first, last = len(images) * 8 // 10, len(images) * 9 // 10
    wanted = {"train": slice(None, first), "validation": slice(first, last), "test": slice(last, None)}[split]
    side = None
    for place in order[wanted].tolist():
        path, label = images[place]
        pixels = _pixels(config, path)
        side = side or len(pixels)
        if pixels.shape != (side, side):
            raise problem(config, path, f"is {pixels.shape[1]} x {pixels.shape[0]} pixels, others {side} x {side}")
        yield [pixels.reshape(-1)], label


def _listed(config: ReleasedPathfinderConfig) -> list[tuple[Path, int]]:
    """Return images and classes of a level, in the order of its lists. metadata/N.npy is a text file despite its name.
    Its lines begin with an image's folder, file, number and class."""
    folder = config.source / LEVELS[config.level]
    lists = sorted((folder / "metadata").glob("*.npy"), key=lambda path: (len(path.stem), path.stem))
    if not lists:
        raise FileProblem(f"{folder / 'metadata'}: no *.npy there; {expected(ReleasedPathfinderConfig)}")
    found = []
    for path in lists:
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            fields = line.split(" ")
            if len(fields) < 4 or fields[3] not in ("0", "1"):
                raise problem(config, path, f"line {number} is not 'folder file number class …'")
            image = folder / fields[0] / fields[1]
            if not image.is_file():
                raise problem(config, image, f"no such file, and line {number} of {path} names it")
            if image.stat().st_size:
                found.append((image, int(fields[3])))
    return found


def _pixels(config: ReleasedPathfinderConfig, path: Path) -> np.ndarray:
    """Read an image as grey values (height, width) uint8."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return np.asarray(image.convert("L"))
    except (OSError, UnidentifiedImageError, SyntaxError) as error:  # Pillow raises these for a damaged file
        raise problem(config, path, f"is no PNG image: {error}") from None
