"""The code on the page about the library is run unchanged."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from bst_dist import BlockStateTransformer, BSTLayer
from bst_dist.train.config import OptimizerConfig
from bst_dist.train.optimizer import build_for

PAGE = Path(__file__).parents[2] / "docs" / "library.md"


def code() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


COMPLETEP = ", parametrisation={'kind': 'completep', 'base_width': 16, 'base_depth': 1}"


@pytest.mark.parametrize(
    "settings",
    ["", COMPLETEP, COMPLETEP + ", ssm={'kernel': 'hyena', 'length': 64}"],
    ids=["standard", "completep", "completep, filters"],
)
def test_the_optimizer_of_the_page_equals_that_of_a_run(settings):
    model, loop = code()[:2]
    names: dict = {}
    exec(model.replace("placement=[1]", f"placement=[1]{settings}") + loop.split("text = ")[0], names)
    config = OptimizerConfig(learning_rate=3e-3, ssm_learning_rate=1e-3, weight_decay=0.1)
    found, expected = (
        {group["name"]: group for group in one.param_groups}
        for one in (names["optimizer"], build_for(names["model"], config))
    )
    trained = [parameter for group in found.values() for parameter in group["params"]]
    assert {id(p) for p in trained} == {id(p) for p in names["model"].parameters()}
    for name, group in expected.items():
        assert [id(p) for p in found[name]["params"]] == [id(p) for p in group["params"]]
        for field in ("lr", "weight_decay", "eps"):
            assert found[name][field] == pytest.approx(group[field])


def test_the_code_of_the_page_runs_and_learns():
    blocks = code()
    assert len(blocks) == 4
    names: dict = {}
    torch.manual_seed(0)
    exec(compile("\n".join(blocks), str(PAGE), "exec"), names)
    losses = names["losses"].per_token.mean().item()
    assert losses < 2.5 < names["model"](names["text"][:, :-1] * 0, labels=names["text"][:, 1:]).per_token.mean().item()
    assert names["x"].shape == (2, 256, 64)


def test_a_layer_is_causal():
    torch.manual_seed(0)
    layer = BSTLayer(width=16, heads=2, block=8).double()
    x = torch.randn(1, 32, 16, dtype=torch.float64)
    changed = x.clone()
    changed[:, 20:] += 1
    assert torch.equal(layer(x)[:, :20], layer(changed)[:, :20])
    assert not torch.allclose(layer(x)[:, 20:], layer(changed)[:, 20:])


def test_a_model_from_arguments_equals_one_from_a_recipe():
    from bst_dist.model.config import ModelConfig
    from bst_dist.model.lm import LanguageModel

    torch.manual_seed(1)
    one = BlockStateTransformer(17, width=16, depth=2, heads=2, block=8, context={"variant": "MF", "states": 4})
    torch.manual_seed(1)
    config = ModelConfig.model_validate(
        {
            "vocab_size": 17,
            "width": 16,
            "depth": 2,
            "heads": 2,
            "block": 8,
            "ffn": 64,
            "mixer": "bst",
            "context": {"variant": "MF", "states": 4},
        }
    )
    other = LanguageModel(config)
    ids = torch.arange(16).view(1, 16)
    assert torch.equal(one(ids), other(ids))
