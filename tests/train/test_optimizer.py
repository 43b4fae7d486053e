from __future__ import annotations

import pytest
import torch

from bst_dist.model.config import ModelConfig
from bst_dist.model.lm import LanguageModel
from bst_dist.train.config import OptimizerConfig
from bst_dist.train.optimizer import Groups, build


def small_model() -> LanguageModel:
    return LanguageModel(
        ModelConfig(vocab_size=11, width=8, heads=2, ffn=8, block=4, depth=2, mixer="bst", ssm={"state": 4, "chunk": 4})
    )


def test_every_parameter_is_in_one_group_and_only_matrices_decay():
    model = small_model()
    optimizer = build(OptimizerConfig(weight_decay=0.2, ssm_learning_rate=1e-4), model.parameter_groups())
    of_group = {group["name"]: {id(p) for p in group["params"]} for group in optimizer.param_groups}
    assert sum(map(len, of_group.values())) == len(list(model.parameters()))
    assert set.union(*of_group.values()) == {id(p) for p in model.parameters()}
    assert id(model.embedding.weight) in of_group["vectors"]
    assert {group["name"]: group["weight_decay"] for group in optimizer.param_groups} == {
        "matrices": 0.2,
        "vectors": 0.0,
        "ssm": 0.0,
    }
    assert optimizer.param_groups[2]["lr"] == 1e-4


def test_completep_scales_are_applied_and_restored_per_group():
    base = {"kind": "completep", "base_width": 8, "base_depth": 2}
    larger = {"width": 32, "depth": 6, "parametrisation": base}
    model = LanguageModel(ModelConfig(**(small_model().config.model_dump() | larger)))
    settings = OptimizerConfig(learning_rate=1e-2, ssm_learning_rate=1e-3, weight_decay=0.2, eps=1e-8)
    optimizer = build(settings, model.parameter_groups(), model.group_scales())
    groups = Groups(optimizer)
    for group in optimizer.param_groups:
        group.update(lr=7.0, weight_decay=7.0, eps=1.0)
    groups.apply(optimizer, 1.0)
    found = {g["name"]: (g["lr"], g["weight_decay"], g["eps"]) for g in optimizer.param_groups}
    assert found == {
        "matrices": (1e-2 / 4, 0.2 * 4, 1e-8 * (1 / 12)),
        "vectors": (1e-2, 0.0, 1e-8 * (1 / 12)),
        "ssm": (1e-3, 0.0, 1e-8 * (1 / 12)),
        "embedding": (1e-2, 0.0, 1e-8 / 4),
    }


def test_the_optimizer_is_exactly_fused_torch_adamw():
    optimizer = build(OptimizerConfig(), small_model().parameter_groups())
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.defaults["fused"]  # one kernel for all parameters


def test_an_engine_with_other_groups_is_refused():
    optimizer = build(OptimizerConfig(), small_model().parameter_groups())
    groups = Groups(optimizer)
    del optimizer.param_groups[2]
    with pytest.raises(ValueError, match="shorter"):
        groups.apply(optimizer, 1.0)


def test_apply_restores_group_settings_after_loading():
    optimizer = build(OptimizerConfig(), small_model().parameter_groups())
    groups = Groups(optimizer)
    for group in optimizer.param_groups:
        group.update(lr=7.0, weight_decay=7.0, betas=(0, 0), eps=1.0)
    assert groups.apply(optimizer, 0.5) == {"matrices": 5e-4, "vectors": 5e-4, "ssm": 5e-4}
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0, 0.0]
    assert all(group["betas"] == (0.9, 0.95) and group["eps"] == 1e-8 for group in optimizer.param_groups)
    assert groups.apply(optimizer, 1.0)["ssm"] == 1e-3  # factors do not accumulate
