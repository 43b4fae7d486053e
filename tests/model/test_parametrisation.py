"""CompleteP: the standard model at its base shape, multipliers by closed form, every mixer's groups."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError

from bst_dist.model.config import ModelConfig
from bst_dist.model.layers import MIXERS
from bst_dist.model.lm import LanguageModel
from bst_dist.train.config import OptimizerConfig
from bst_dist.train.optimizer import build

VOCABULARY, BLOCK = 30, 8
BASE = {"kind": "completep", "base_width": 16, "base_depth": 2}
SETTINGS = {
    "context": {"states": 3},
    "ssm": {"state": 4, "chunk": 4},
    "block_recurrent": {"states": 3},
    "transformer_xl": {"window": BLOCK},
    "mamba2": {"head": 8},
}


def make(mixer="bst", width=16, depth=2, parametrisation=None, **changes) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(
        ModelConfig(
            width=width,
            heads=width // 8,
            ffn=2 * width,
            block=BLOCK,
            depth=depth,
            vocab_size=VOCABULARY,
            mixer=mixer,
            placement=[depth - 1],
            parametrisation=parametrisation or {},
            **(SETTINGS | changes),
        )
    )


def trained(model, steps=3) -> list[torch.Tensor]:
    ids = torch.randint(VOCABULARY, (2, 2 * BLOCK + 1), generator=torch.Generator().manual_seed(1))
    optimizer = build(OptimizerConfig(learning_rate=1e-2), model.parameter_groups(), model.group_scales())
    for _ in range(steps):
        optimizer.zero_grad()
        (model(ids[:, :-1], ids[:, 1:]).total / ids.numel()).backward()
        optimizer.step()
    return list(model.parameters())


@pytest.mark.parametrize("mixer", MIXERS)
def test_completep_at_its_base_shape_is_bitwise_the_standard_model(mixer):
    for standard, scaled in zip(trained(make(mixer)), trained(make(mixer, parametrisation=BASE)), strict=True):
        assert torch.equal(standard, scaled)


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_parameter_is_in_one_group_and_every_group_has_its_multipliers(mixer):
    model = make(mixer, width=64, depth=6, parametrisation=BASE)
    groups, scales = model.parameter_groups(), model.group_scales()
    assert sorted(id(p) for group in groups.values() for p in group) == sorted(map(id, model.parameters()))
    assert scales["matrices"] == (1 / 4, 4, 1 / 12)
    assert scales["ssm"] == scales["vectors"] == scales["filters"] == (1, 1, 1 / 12)
    assert scales["embedding"] == (1, 1, 1 / 4)
    assert {id(p) for p in groups["embedding"]} == {id(model.embedding.weight), id(model.norm.weight)}
    # Only parameters that grow in both dimensions are matrices, whose learning rate falls with the width.
    narrow = dict(make(mixer, width=32, depth=6, parametrisation=BASE).named_parameters())
    names = {id(p): name for name, p in model.named_parameters()}
    for p in groups["matrices"]:
        before = narrow[names[id(p)]]
        # Mamba-2's first map also makes B and C, whose size is fixed, so it grows less.
        least = 2 if names[id(p)].endswith("mixer.into.weight") else 4
        assert least * before.numel() <= p.numel() <= 4 * before.numel(), names[id(p)]
    for name in ("vectors", "ssm", "filters"):
        for p in groups.get(name, []):
            assert p.numel() <= 2 * narrow[names[id(p)]].numel(), names[id(p)]


def test_an_untied_head_is_in_the_embedding_group():
    model = make(width=64, parametrisation=BASE, tied=False)
    outside = {id(p) for p in (model.embedding.weight, model.norm.weight, model.output.weight)}
    assert {id(p) for p in model.parameter_groups()["embedding"]} == outside
    standard = make(tied=False)
    assert id(standard.output.weight) in {id(p) for p in standard.parameter_groups()["vectors"]}


def test_hyena_filter_networks_have_their_own_group():
    groups = make(ssm={"kernel": "hyena", "length": 16, "hidden": 8}, parametrisation=BASE).parameter_groups()
    assert len(groups["filters"]) == 4  # three layers with sines and the linear one
    standard = make(ssm={"kernel": "hyena", "length": 16, "hidden": 8}).parameter_groups()
    assert set(standard) == {"matrices", "vectors", "ssm"}
    assert len(standard["matrices"]) == len(groups["matrices"]) + 4


def test_branches_logits_and_initial_values_equal_closed_forms():
    model = make("sliding", width=64, depth=8, parametrisation=BASE).double()
    ids = torch.zeros(1, BLOCK, dtype=torch.long)
    layer, seen = model.layers[0], {}
    for name in ("mixer", "ffn"):
        getattr(layer, name).register_forward_hook(lambda _, __, out, name=name: seen.__setitem__(name, out))
    layer.register_forward_hook(lambda _, inputs, out: seen.update(x=inputs[0], y=out))
    model.layers[-1].register_forward_hook(lambda _, __, out: seen.__setitem__("last", out))
    logits = model(ids)
    torch.testing.assert_close(seen["y"], seen["x"] + (seen["mixer"] + seen["ffn"]) * 2 / 8)
    expected = model.norm(seen["last"][:, -1]) @ model.embedding.weight.T / (math.sqrt(16) * 64 / 16)
    torch.testing.assert_close(logits, expected)
    assert float(layer.ffn.out.weight.detach().std()) == pytest.approx(1 / math.sqrt(2 * 2 * 128), rel=0.05)


def test_invalid_completep_settings_are_refused():
    with pytest.raises(ValidationError, match="base_depth"):
        make(parametrisation={"kind": "completep", "base_width": 16})
    with pytest.raises(ValidationError, match=r"context\.ssm_width must be proportional"):
        make(parametrisation=BASE, context={"ssm_width": 4})
