from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bst_dist.cli import main
from bst_dist.config import load_recipe
from bst_dist.model.layers import Layer
from bst_dist.model.lm import LanguageModel
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


SMALL = """
name: small
model: {width: 256, heads: 8, ffn: 512, block: 32, depth: 4, placement: [1, 2], vocab_size: 100}
data: {corpus: nowhere}
train: {steps: 10, sequence_length: 256, sequences: 8}
"""
SELECTIVE = [
    ["mixer=bst", "ssm={kernel: ssd}"],
    ["mixer=bst", "ssm={kernel: ssd, head: 32, chunk: 32}", "context={variant: MH, ssm_width: 96}"],
    ["mixer=bst-joint", "ssm={kernel: ssd}"],
    ["mixer=ssm", "ssm={kernel: ssd, head: 128}"],
    ["mixer=bst", "filler=ssm", "ssm={kernel: ssd}"],
    ["mixer=mamba2"],
    ["mixer=mamba2", "mamba2={head: 128, state: 128, chunk: 16, convolution: 30}"],
    ["mixer=mamba2", "mamba2={head: 24, expand: 3}", "width=248"],
    ["mixer=gated-deltanet", "gated_deltanet={convolution: 33, expand: 1}"],
    ["mixer=gss", "gss={reduce: 31, gate: 2}", "width=248"],
    ["mixer=full", "full={longest: 256}"],
]


@pytest.mark.parametrize("changes", SELECTIVE, ids=" ".join)
def test_the_small_copy_of_any_valid_model_computes(changes, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(SMALL)
    recipe = load_recipe(path, [f"model.{change}" for change in changes])
    for mixer in set(recipe.model.mixers()):
        Layer(mixer, recipe.model)  # it is valid at full size
    small = shrink(recipe, 16, rows=8)
    model = LanguageModel(small.model)
    ids = torch.zeros(1, small.train.sequence_length, dtype=torch.long)
    model(ids, ids).total.backward()
    assert small.model.unread() == []


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
