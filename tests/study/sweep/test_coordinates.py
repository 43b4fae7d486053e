"""The coordinate check on models whose dependence on the width is known."""

from __future__ import annotations

import torch

from bst_dist.model.config import ModelConfig
from bst_dist.model.lm import LanguageModel
from bst_dist.study.sweep.coordinates import Coordinate, changes_of, check, repeat_kernels
from bst_dist.train.config import OptimizerConfig


def model(width, depth, **changes):
    return LanguageModel(ModelConfig(width=width, heads=width // 8, ffn=4 * width, block=16, depth=depth, mixer="bst",
                                     placement=[depth - 1], vocab_size=40, **changes))  # fmt: skip


def completep(width, depth):
    return model(width, depth, parametrisation={"kind": "completep", "base_width": 32, "base_depth": 2})


IDS = torch.randint(40, (2, 33), generator=torch.Generator().manual_seed(0))


def test_one_rate_for_all_widths_moves_wide_models_further_but_not_their_dynamics():
    """Under Adam each weight moves by the rate, so a sum over the width grows with it; dynamics are per channel."""
    found = check(model, (16, 32, 64), (2, 4), OptimizerConfig(learning_rate=4e-3), IDS, seeds=range(2))
    slopes = {(one.watched, one.along): one for one in found}
    assert slopes["ffn", "width"].slope > 0.5
    assert not slopes["ffn", "width"].passed
    assert abs(slopes["ssm dynamics", "width"].slope) < 0.3
    assert {one.watched for one in found} == {"stream", "mixer", "ffn", "ssm", "logits", "ssm dynamics"}


def test_under_completep_no_change_depends_on_the_width_or_the_depth_dynamics_included():
    settings = OptimizerConfig(learning_rate=4e-3)
    found = check(completep, (32, 64, 128), (2, 4, 8), settings, IDS, seeds=range(8))
    assert {(one.watched, one.along) for one in found} >= {("ssm dynamics", "width"), ("ssm dynamics", "depth")}
    assert [(one.watched, one.along, one.changes) for one in found if not one.passed] == []


def test_kernels_of_a_wide_model_repeat_those_of_the_narrow_one():
    wide, narrow = model(32, 2), model(16, 2)
    repeat_kernels(wide, narrow)
    many, few = (m.layers[1].mixer.cross.context.ssm for m in (wide, narrow))
    assert torch.equal(many.kernel(5), few.kernel(5).repeat(1, 2, 1))


def test_changes_grow_with_the_rate_and_vanish_without_one():
    small = changes_of(model(16, 2), OptimizerConfig(learning_rate=1e-12, ssm_learning_rate=1e-12), IDS, steps=2)
    assert all(change < 1e-6 for change in small.values())


def test_a_flat_line_passes_and_a_steep_one_does_not():
    assert Coordinate("x", "width", {}, 0.1, 0.0).passed
    assert not Coordinate("x", "width", {}, -0.3, 0.0).passed
