from __future__ import annotations

from pathlib import Path

import pytest

from bst_dist.cli import main
from bst_dist.config import load_recipe
from bst_dist.verify.shrink import BLOCK, shrink

ROOT = Path(__file__).parents[2] / "launch" / "recipes"
# Recipes of language models. Those in lra/ are classifiers; those in ablations/ are experiments on one base recipe.
RECIPES = [*sorted(ROOT.glob("*.yaml")), *sorted(ROOT.glob("paper/*.yaml")), ROOT / "ablations" / "base.yaml"]

DEMO = next(path for path in RECIPES if path.stem == "demo")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_small_copy_keeps_mixers_variant_kernel_and_data(path):
    recipe = load_recipe(path)
    small = shrink(recipe, 4, rows=8)
    assert set(small.model.mixers()) == set(recipe.model.mixers())
    assert small.model.context.variant == recipe.model.context.variant
    assert small.model.ssm.kernel == recipe.model.ssm.kernel
    assert small.data == recipe.data
    assert small.train.sequence_length % (4 * BLOCK) == 0
    assert small.model.depth <= 4
    assert small.model.width <= 32


def test_the_small_copy_keeps_layer_order_and_lengths_in_blocks(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("""
name: deep
model: {width: 512, heads: 8, ffn: 2048, block: 128, depth: 12, mixer: bst, placement: [1, 7, 9],
        ssm: {kernel: hyena, length: 512}, vocab_size: 1000}
data: {corpus: nowhere}
train: {steps: 10, sequence_length: 1024, sequences: 8}
""")
    small = shrink(load_recipe(path), 2, rows=8)
    assert small.model.mixers() == ["bst", "sliding", "bst", "bst"]
    assert small.train.sequence_length == 8 * BLOCK
    assert small.model.ssm.length == 4 * BLOCK


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["model.mixer=block-recurrent", "--sp", "2"], "set parallel.sp to 1"),
        (["--ranks", "3", "--sp", "2"], "2 does not divide the 3 ranks"),
        (["model.mixer=sliding", "--variants", "SH"], "sliding has none"),
        (["--accumulation", "0"], "1 or more"),
        (["deepspeed=ds_configs/zero9.json"], "zero9.json: no such file"),
    ],
)
def test_invalid_verify_options_are_refused_before_anything_starts(options, said, capsys, monkeypatch):
    monkeypatch.setattr("bst_dist.verify.command.launch", lambda *_: pytest.fail("launched"))
    assert main(["verify", str(DEMO), *options]) == 2
    assert said in capsys.readouterr().err


def test_a_classifier_is_refused_before_anything_is_started(capsys):
    assert main(["verify", str(ROOT / "lra" / "listops.yaml")]) == 2
    assert "learns the task listops: only language models can be verified" in capsys.readouterr().err
