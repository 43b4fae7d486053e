"""The list of models: its counts compared with real modules, and the paper's recipes."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from bst_dist.cli import main
from bst_dist.config import load_recipe
from bst_dist.model.config import AttentionConfig, ModelConfig
from bst_dist.model.lm import LanguageModel
from bst_dist.plan.flops import forward_flops
from bst_dist.plan.models import catalogue, entry

LENGTH = 128
CONFIG = ModelConfig(
    width=32,
    heads=4,
    ffn=48,
    block=32,
    depth=4,
    vocab_size=50,
    mixer="bst",
    placement=[1, 3],
    transformer_xl={"window": 64},
)
MODELS = catalogue(CONFIG, LENGTH)
RECIPES = sorted(Path(__file__).parents[2].glob("launch/recipes/paper/*.yaml"))


@pytest.mark.parametrize("name", MODELS)
def test_counts_equal_those_of_the_built_model(name):
    config = MODELS[name]
    found, model = entry(name, config, LENGTH), LanguageModel(config)
    assert found.total_parameters == sum(p.numel() for p in model.parameters())
    for kind, modules in {"embedding": [model.embedding], "ffn": [layer.ffn for layer in model.layers]}.items():
        assert found.parameters[kind] == sum(p.numel() for module in modules for p in module.parameters())
    own = [p for key, p in model.named_parameters() if {"ssm", "scan", "rule"} & set(key.split("."))]
    assert found.parameters["ssm"] == sum(p.numel() for p in own)
    assert found.total_forward_flops_per_token == sum(forward_flops(config, LENGTH).values())
    past = model.carry()
    model(torch.zeros(1, LENGTH, dtype=torch.long), past=past)
    assert found.state_bytes == sum(x.numel() * x.element_size() for x in past.after.values())


@pytest.mark.parametrize(
    "changes",
    [
        {"block": 192},
        {"block": 320},
        {"block": 96, "mixer": "sliding"},
        {"width": 62, "heads": 1},
        {"context": {"ssm_width": 48}, "width": 40},
        {"block": 96, "mixer": "mamba2", "mamba2": {"chunk": 48}},
    ],
)
def test_every_model_is_listed_at_any_valid_sizes(changes):
    config = ModelConfig.model_validate(CONFIG.model_dump() | {"ssm": {"chunk": 32}} | changes)
    found = catalogue(config, 4 * config.block)
    names, expected = ([name.rstrip(" 0123456789") for name in models] for models in (found, MODELS))
    assert names == expected  # without Transformer-XL's window, which follows the block
    for each in found.values():
        with torch.device("meta"):
            LanguageModel(each)
    chunk = found["Mamba-2 hybrid"].mamba2.chunk
    assert chunk == (48 if "mamba2" in changes else 64 if config.block != 96 else 32)


def test_models_that_cannot_be_built_are_named_with_the_reason(tmp_path, capsys):
    path = RECIPES[[path.stem for path in RECIPES].index("small-sliding")]
    report = tmp_path / "models.json"
    small = ["model.width=7", "model.heads=7", "model.head_width=2", "model.ffn=8", "model.block=32"]
    small += ["model.vocab_size=50", "train.sequence_length=64"]
    assert main(["models", str(path), *small, "--json", str(report)]) == 0
    assert "not listed: BST MF s4d: context.ssm_width" in capsys.readouterr().out
    assert "BST MF s4d" in json.loads(report.read_text())["refused"]


def test_model_sizes_equal_the_equations():
    """By the equations, a sliding mixer has 4 D² plus H scales and the biases, a feed-forward network 2 D M."""
    d, h, m, layers, vocabulary = 32, 4, 48, 4, 50
    found = entry("sliding", MODELS["sliding window"], LENGTH)
    assert found.parameters == {
        "embedding": vocabulary * d,
        "attention": layers * (4 * d * d + h + 32 * h),
        "ssm": 0,
        "ffn": layers * 2 * d * m,
        "norm": (2 * layers + 1) * d,
    }
    assert found.state_bytes == layers * 32 * 2 * d * 4  # a window of keys and values, in single precision
    s, ds, n = 16, d // 4, 16  # two BST layers: down, second query, wider output, keys and values, scales
    bst = entry("SH", MODELS["BST SH s4d"], LENGTH)
    assert bst.parameters["attention"] - found.parameters["attention"] == 2 * (d * ds + 2 * d * d + 2 * ds * d + h)
    assert bst.parameters["ssm"] == 2 * ds * (1 + s + 1 + n)  # step; decays and frequencies; skip; complex read-out
    assert bst.state_bytes - found.state_bytes == 2 * ds * n * 4


@pytest.mark.parametrize(("name", "heads"), [("Mamba-2 hybrid", 1), ("Gated DeltaNet hybrid", 4)])
def test_decays_and_steps_of_a_selective_recurrence_count_as_its_ssm(name, heads):
    """A decay and a step per head, in three of four layers; Mamba-2 at D 32 has one head of 64."""
    assert entry(name, MODELS[name], LENGTH).parameters["ssm"] == 3 * 2 * heads


def test_gate_adds_a_third_ffn_matrix_per_layer():
    d, m, layers = 32, 48, 4
    plain, gated = (entry("", CONFIG.model_copy(update={"activation": name}), LENGTH) for name in ("relu", "swiglu"))
    assert gated.total_parameters - plain.total_parameters == layers * d * m
    assert gated.total_forward_flops_per_token - plain.total_forward_flops_per_token == layers * 2 * d * m


def test_untied_head_is_counted_with_the_embedding():
    tied, own = (entry("", CONFIG.model_copy(update={"tied": tied}), LENGTH) for tied in (True, False))
    assert own.parameters["embedding"] == 2 * tied.parameters["embedding"] == 2 * 50 * 32
    assert own.total_parameters == sum(
        p.numel() for p in LanguageModel(CONFIG.model_copy(update={"tied": False})).parameters()
    )
    assert own.total_forward_flops_per_token == tied.total_forward_flops_per_token


def test_shared_keys_and_values_reduce_parameters_and_state():
    d, layers, window = 32, 4, 32
    plain, shared = (
        entry("", CONFIG.model_copy(update={"attention": AttentionConfig(kv_heads=heads)}), LENGTH) for heads in (4, 1)
    )
    assert plain.total_parameters - shared.total_parameters == layers * 2 * d * (d - 8)  # one head of 8 instead of four
    assert plain.state_bytes - shared.state_bytes == layers * window * 2 * (d - 8) * 4


def test_half_precision_halves_keys_and_values_but_not_the_recurrent_state():
    whole, half = (entry("SH", MODELS["BST SH s4d"], LENGTH, half) for half in (False, True))
    recurrent = 2 * 8 * 16 * 4
    assert half.state_bytes - recurrent == (whole.state_bytes - recurrent) / 2


@pytest.mark.parametrize("path", RECIPES, ids=[path.stem for path in RECIPES])
def test_paper_recipe_has_the_name_of_its_file_and_states_its_size(path):
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    counted = entry(recipe.name, recipe.model, recipe.train.sequence_length).total_parameters
    assert f": {counted / 1e6:.1f} M parameters" in path.read_text()
    assert recipe.model.unread() == []
    layers = recipe.model.mixers()
    assert len(layers) == 12
    assert recipe.model.head == 128
    # Counted from 0. The last BST layer is where Block-Recurrent's only recurrent layer is, the 10th of 12.
    places = {"bst": [1, 5, 7, 9] if path.stem.startswith("large") else [1, 7, 9], "block-recurrent": [9]}
    kind = recipe.model.mixer.removesuffix("-no-cross")
    assert kind not in places or recipe.model.placement == places[kind]


def test_the_large_models_have_the_papers_shape():
    """D 1024, M 8192, and heads that together are twice as wide as the model.

    In units of D², a sliding layer has 8 for attention and 16 for the feed-forward network. BST adds 2 for the query, 2
    for the output, 1/4 for the down projection, and 1 for keys and values.
    """
    d2, vocabulary = 1024**2, 32_000 * 1024
    for name, expected in {"large-sliding": 12 * 24 * d2, "large-bst-sh": (12 * 24 + 4 * 5.25) * d2}.items():
        recipe = load_recipe(f"paper/{name}")
        assert (recipe.model.width, recipe.model.inner, recipe.model.ffn) == (1024, 2048, 8192)
        found = entry(name, recipe.model, recipe.train.sequence_length)
        small = found.parameters["ssm"] + found.parameters["norm"] + 12 * 16 * 33 + (4 * 16 if "bst" in name else 0)
        assert found.total_parameters == expected + vocabulary + small


def test_the_command_lists_the_recipe_first_and_every_model(tmp_path, capsys):
    path = RECIPES[[path.stem for path in RECIPES].index("small-bst-sh")]
    report = tmp_path / "models.json"
    small = ["model.width=32", "model.heads=2", "model.ffn=32", "model.block=32", "train.sequence_length=64"]
    assert main(["models", str(path), *small, "--json", str(report)]) == 0
    assert "full attention" in capsys.readouterr().out
    assert '"name": "small-bst-sh"' in report.read_text().split('"models"')[1].split("}")[0]


def test_norm_parameters_are_counted_completely():
    model = LanguageModel(MODELS["Block-Recurrent"])
    counted = entry("", MODELS["Block-Recurrent"], LENGTH).parameters
    norms = [m for m in model.modules() if isinstance(m, nn.RMSNorm)]
    assert counted["norm"] == sum(m.weight.numel() for m in norms)
