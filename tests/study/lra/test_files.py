"""Small versions of the published files: read in their format, and refused with a reason if they are different."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from bst_dist.study.lra.files import FileProblem, ImageConfig, RetrievalConfig, TextConfig, image, retrieval, text


@pytest.fixture
def imdb(tmp_path: Path) -> Path:
    """aclImdb with 20 reviews in each of its four directories, and the other files next to them."""
    root = tmp_path / "aclImdb"
    for part in ("train", "test"):
        for kind in ("neg", "pos"):
            (root / part / kind).mkdir(parents=True)
            for number in range(20):
                content = f"{part} {kind} {number}<br /><br />café"
                (root / part / kind / f"{number}_{number % 10}.txt").write_text(content, encoding="utf-8")
        (root / part / "urls_pos.txt").write_text("not a review")
    (root / "train" / "unsup").mkdir()
    (root / "train" / "unsup" / "0_0.txt").write_text("without a class")
    return root


def read_reviews(imdb: Path, split: str) -> list[tuple[str, int]]:
    found = text(TextConfig(source=imdb), split)
    return [(symbols.tobytes().decode(), label) for (symbols,), label in found]


def test_each_review_has_its_class_and_is_in_one_split(imdb):
    splits = {split: read_reviews(imdb, split) for split in ("train", "validation", "test")}
    assert {split: len(found) for split, found in splits.items()} == {"train": 36, "validation": 4, "test": 40}
    for split, found in splits.items():
        for review, label in found:
            part, kind, _ = review.split(" ", 2)
            assert (part, kind) == ("test" if split == "test" else "train", "pos" if label else "neg")
            assert review.endswith("<br /><br />café")
    texts = [review for found in splits.values() for review, _ in found]
    assert len(set(texts)) == 80


def test_missing_reviews_error_says_where_to_get_them(imdb):
    with pytest.raises(FileProblem, match=r"elsewhere/train/neg: no \*\.txt there; source should be .*aclImdb_v1"):
        next(text(TextConfig(source=imdb.parent / "elsewhere"), "train"))
    (imdb / "test" / "pos" / "3_3.txt").write_bytes(b"")
    with pytest.raises(FileProblem, match=r"3_3\.txt: is empty"):
        list(text(TextConfig(source=imdb), "test"))


def write_pairs(folder: Path, name: str, lines: list[bytes]) -> None:
    (folder / f"new_aan_pairs.{name}.tsv").write_bytes(b"".join(line + b"\n" for line in lines))


def test_pairs_keep_their_bytes_and_labels(tmp_path):
    for name in ("train", "eval", "test"):
        texts = [b'of "quotes" in ' + name.encode(), "naïve".encode()]
        write_pairs(tmp_path, name, [b"\t".join((b"1.0", b"P01-1", b"P02-2", *texts)), b"0.0\tA\tB\tone\ttwo"])
    for split, name in (("train", b"train"), ("validation", b"eval"), ("test", b"test")):
        found = [
            ([s.tobytes() for s in pair], label) for pair, label in retrieval(RetrievalConfig(source=tmp_path), split)
        ]
        assert found == [([b'of "quotes" in ' + name, "naïve".encode()], 1), ([b"one", b"two"], 0)]


@pytest.mark.parametrize(
    "line", [b"1.0\tA\tB\tone", b"2.0\tA\tB\tone\ttwo", b"0.0\tA\tB\t\ttwo", b"0.0\tA\tB\ta\tb\tc"]
)
def test_damaged_line_is_named(tmp_path, line):
    write_pairs(tmp_path, "train", [b"0.0\tA\tB\tone\ttwo", line])
    with pytest.raises(FileProblem, match=r"new_aan_pairs\.train\.tsv: line 2 is not 'label, id, id, text, text'"):
        list(retrieval(RetrievalConfig(source=tmp_path), "train"))


def test_missing_pairs_are_named(tmp_path):
    with pytest.raises(FileProblem, match=r"new_aan_pairs\.eval\.tsv: no such file; source should be .*lra_release"):
        next(retrieval(RetrievalConfig(source=tmp_path), "validation"))


@pytest.fixture
def batches() -> dict[str, tuple[np.ndarray, list[int]]]:
    """Return four random images for each of CIFAR-10's six files."""
    random = np.random.default_rng(0)
    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    return {name: (random.integers(0, 256, (4, 3072), np.uint8), random.integers(0, 10, 4).tolist()) for name in names}


def write_pickled(folder: Path, batches: dict) -> None:
    for name, (pixels, labels) in batches.items():
        content = {b"batch_label": b"a batch", b"labels": labels, b"data": pixels, b"filenames": [b"x.png"] * 4}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))


def write_binary(folder: Path, batches: dict) -> None:
    for name, (pixels, labels) in batches.items():
        rows = np.concatenate((np.array(labels, np.uint8)[:, None], pixels), axis=1)
        (folder / f"{name}.bin").write_bytes(rows.tobytes())


@pytest.mark.parametrize("write", [write_pickled, write_binary])
def test_images_are_read_as_grey_pixels_from_both_formats(tmp_path, batches, write):
    write(tmp_path, batches)
    found = {split: list(image(ImageConfig(source=tmp_path), split)) for split in ("train", "validation", "test")}
    assert [len(found[split]) for split in found] == [18, 2, 4]
    training = np.concatenate([batches[f"data_batch_{number}"][0] for number in range(1, 6)])
    labels = [label for number in range(1, 6) for label in batches[f"data_batch_{number}"][1]]
    images = found["train"] + found["validation"]
    assert [label for _, label in images] == labels
    for ((grey,), _), pixels in zip(images, training, strict=True):
        red, green, blue = pixels.astype(float).reshape(3, 1024)
        assert grey.shape == (1024,)
        assert np.abs(grey - (0.299 * red + 0.587 * green + 0.114 * blue)).max() <= 1
    assert [label for _, label in found["test"]] == batches["test_batch"][1]


def test_missing_and_damaged_batches_are_named(tmp_path, batches):
    with pytest.raises(FileProblem, match=r"data_batch_1: no such file \(nor with \.bin\); source should be .*cifar"):
        next(image(ImageConfig(source=tmp_path), "train"))
    write_binary(tmp_path, batches)
    cut = tmp_path / "test_batch.bin"
    cut.write_bytes(cut.read_bytes()[:-1])
    with pytest.raises(FileProblem, match=r"test_batch\.bin: is no batch of CIFAR-10"):
        next(image(ImageConfig(source=tmp_path), "test"))


class Harmful:
    def __reduce__(self):
        return (print, ("run by a pickle",))


@pytest.mark.parametrize("content", [pickle.dumps({b"data": Harmful(), b"labels": [0]}), b"nonsense", b""])
def test_harmful_or_invalid_pickle_is_refused_and_not_executed(tmp_path, batches, content, capsys):
    write_pickled(tmp_path, batches)
    (tmp_path / "test_batch").write_bytes(content)
    with pytest.raises(FileProblem, match="test_batch: is no batch of CIFAR-10"):
        next(image(ImageConfig(source=tmp_path), "test"))
    assert "run by" not in capsys.readouterr().out
