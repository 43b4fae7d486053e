"""Small versions of the benchmark's released ListOps and Pathfinder files, in the same format."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bst_dist.cli import main
from bst_dist.study.lra.examples import open_split
from bst_dist.study.lra.files import FileProblem
from bst_dist.study.lra.listops import text
from bst_dist.study.lra.released import ReleasedListOpsConfig, ReleasedPathfinderConfig, listops, pathfinder
from bst_dist.study.lra.tasks import SPLITS, TASKS

# As lra_benchmarks/data/listops.py prints trees: each application has its own parentheses.
EXPRESSIONS = [
    ("( ( ( [MAX 2 ) 9 ) ] )", 9, "[MAX 2 9 ]"),
    ("( ( ( ( [SM 7 ) ( ( ( [MIN 5 ) 4 ) ] ) ) 3 ) ] )", 4, "[SM 7 [MIN 5 4 ] 3 ]"),
    ("( ( ( ( [MED 1 ) 0 ) 8 ) ] )", 1, "[MED 1 0 8 ]"),
]


def write_table(path: Path, rows: list) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([["Source", "Target"], *rows])  # lines end in \r\n, as released


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    """Files with one expression in each split."""
    for name, (source, value, _) in zip(("train", "val", "test"), EXPRESSIONS, strict=True):
        write_table(tmp_path / f"basic_{name}.tsv", [(source, value)])
    return tmp_path


def test_released_expressions_are_read_without_parentheses(tables):
    for split, (_, value, plain) in zip(SPLITS, EXPRESSIONS, strict=True):
        (((symbols,), label),) = listops(ReleasedListOpsConfig(source=tables), split)
        assert (text(symbols), label) == (plain, value)


@pytest.mark.parametrize(
    "row", [["( ( [MAX 2 ) ] )", "12"], ["( ( [FIRST 2 ) ] )", 2], ["", 3], ["( ( [MAX 2 ) ] )"], ["[MAX 2 ]", ""]]
)
def test_a_damaged_expression_is_named(tables, row):
    write_table(tables / "basic_train.tsv", [EXPRESSIONS[0][:2], row])
    with pytest.raises(FileProblem, match=r"basic_train\.tsv: line 3 is not 'expression, value' .*listops-1000"):
        list(listops(ReleasedListOpsConfig(source=tables), "train"))


def test_missing_tables_and_other_tables_are_named(tables):
    (tables / "basic_val.tsv").unlink()
    with pytest.raises(FileProblem, match=r"basic_val\.tsv: no such file; source should be .*basic_train\.tsv"):
        next(listops(ReleasedListOpsConfig(source=tables), "validation"))
    (tables / "basic_test.tsv").write_text("label\tid\n")
    with pytest.raises(FileProblem, match=r"basic_test\.tsv: line 1 is not 'Source, Target'"):
        next(listops(ReleasedListOpsConfig(source=tables), "test"))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """pathfinder32 with 12 lists of 5 images at level `hard`.

    The first two pixels of an image are its number and its class. One file is empty, as in the release.
    """
    level = tmp_path / "pathfinder32" / "curv_contour_length_14"
    (level / "metadata").mkdir(parents=True)
    for part in range(12):
        folder = level / "imgs" / str(part)
        folder.mkdir(parents=True)
        lines = []
        for number in range(5):
            pixels = np.zeros((32, 32), np.uint8)
            pixels[0, 0], pixels[0, 1], pixels[31, 31] = 5 * part + number, (part + number) % 2, 255
            Image.fromarray(pixels).save(folder / f"sample_{number}.png")
            rest = "1.8 0.5 2 14 4 5"  # settings of the generator, which are not read
            lines.append(f"imgs/{part} sample_{number}.png {number} {(part + number) % 2} {rest}\n")
        (level / "metadata" / f"{part}.npy").write_text("".join(lines))
    (level / "imgs" / "3" / "sample_2.png").write_bytes(b"")
    return level.parent


def test_each_image_keeps_its_pixels_and_class_and_is_in_one_split(images):
    config = ReleasedPathfinderConfig(source=images)
    splits = {split: list(pathfinder(config, split)) for split in SPLITS}
    assert {split: len(found) for split, found in splits.items()} == {"train": 47, "validation": 6, "test": 6}
    seen = []
    for (pixels,), label in (example for found in splits.values() for example in found):
        assert (pixels.shape, pixels.dtype, pixels[1023]) == ((1024,), np.uint8, 255)
        assert label == pixels[1] == (pixels[0] // 5 + pixels[0] % 5) % 2
        seen.append(int(pixels[0]))
    assert sorted(seen) == [number for number in range(60) if number != 17]  # all except the empty file
    assert seen != sorted(seen)
    assert [int(pixels[0]) for (pixels,), _ in pathfinder(config, "test")] == seen[-6:]  # one shuffle for all splits


def damage(images: Path, how: str) -> str:
    """Damage the files in the given way; return the expected error message."""
    level = images / "curv_contour_length_14"
    if how == "another level":
        level.rename(images / "curv_baseline")
        return "curv_contour_length_14/metadata: no *.npy there; source should be the directory pathfinder32"
    if how == "no class":
        (level / "metadata" / "4.npy").write_text("imgs/4 sample_0.png 0 2\n")
        return "metadata/4.npy: line 1 is not 'folder file number class …'"
    image = level / "imgs" / "0" / "sample_0.png"
    if how == "no image":
        image.unlink()
        return f"sample_0.png: no such file, and line 1 of {level / 'metadata' / '0.npy'} names it"
    if how == "cut off":
        image.write_bytes(image.read_bytes()[:45])
        return "sample_0.png: is no PNG image"
    Image.fromarray(np.zeros((16, 32), np.uint8)).save(image)
    return "sample_0.png: is 32 x 16 pixels, others 32 x 32"


@pytest.mark.parametrize("how", ["another level", "no class", "no image", "cut off", "another size"])
def test_damaged_images_are_named(images, how):
    said = damage(images, how)
    with pytest.raises(FileProblem, match=re.escape(said)):
        for split in SPLITS:
            list(pathfinder(ReleasedPathfinderConfig(source=images), split))


def test_command_reads_released_files_if_a_source_is_given(tables, images, tmp_path, capsys):
    report, to = tmp_path / "report.json", tmp_path / "examples"
    assert main(["lra", "prepare", "listops", f"source={tables}", "--to", str(to), "--json", str(report)]) == 0
    opened = open_split(to, "validation", TASKS["listops"])
    assert (text(opened.sequences(0)[0]), opened.classes.tolist()) == (EXPRESSIONS[1][2], [4])
    assert json.loads(report.read_text())["settings"]["source"] == str(tables)
    arguments = ["pathfinder", f"source={images}", "level=hrd", "--to", str(tmp_path / "images")]
    assert main(["lra", "prepare", *arguments]) == 2
    assert "'easy', 'intermediate' or 'hard'" in capsys.readouterr().err
    assert main(["lra", "prepare", "pathfinder", "--settings"]) == 0
    assert "level = hard" in capsys.readouterr().out
