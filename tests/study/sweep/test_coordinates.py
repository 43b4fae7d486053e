"""The coordinate check, on models whose dependence on the width is known."""

from __future__ import annotations

import pytest
import torch

from bst_dist.model.config import ModelConfig
from bst_dist.model.lm import LanguageModel
from bst_dist.study.statistics import Estimate
from bst_dist.study.sweep.coordinates import Check, Coordinate, changes_of, coordinates, read_check, repeat_kernels
from bst_dist.train.config import OptimizerConfig


def model(width, depth, **changes):
    return LanguageModel(
        ModelConfig(
            width=width,
            heads=width // 8,
            ffn=4 * width,
            block=16,
            depth=depth,
            mixer="bst",
            placement=[depth - 1],
            vocab_size=40,
            **changes,
        )
    )


def completep(width, depth):
    return model(width, depth, parametrisation={"kind": "completep", "base_width": 32, "base_depth": 2})


IDS = torch.randint(40, (2, 33), generator=torch.Generator().manual_seed(0))


def test_constant_rate_changes_wide_models_more_but_not_ssm_dynamics():
    """Adam moves each weight by the learning rate, so a sum over the width grows with it; dynamics are per channel."""
    found = coordinates(model, (16, 32, 64), (2, 4), OptimizerConfig(learning_rate=4e-3), IDS, seeds=range(2))
    slopes = {(one.watched, one.along): one for one in found}
    assert slopes["ffn", "width"].slope.value > 0.5
    assert slopes["ffn", "width"].answer != "equal"
    assert abs(slopes["ssm dynamics", "width"].slope.value) < 0.3
    assert {one.watched for one in found} == {"stream", "mixer", "ffn", "ssm", "logits", "ssm dynamics"}


def test_changes_under_completep_do_not_depend_on_width_or_depth():
    settings = OptimizerConfig(learning_rate=4e-3)
    found = coordinates(completep, (32, 64, 128), (2, 4, 8), settings, IDS, seeds=range(8))
    assert {(one.watched, one.along) for one in found} >= {("ssm dynamics", "width"), ("ssm dynamics", "depth")}
    assert [(one.watched, one.along, one.changes) for one in found if one.answer == "different"] == []
    assert sum(one.answer == "equal" for one in found) >= 6  # others would need more seeds


def test_kernels_of_a_wide_model_repeat_those_of_the_narrow_one():
    wide, narrow = model(32, 2), model(16, 2)
    repeat_kernels(wide, narrow)
    many, few = (m.layers[1].mixer.cross.context.ssm for m in (wide, narrow))
    assert torch.equal(many.kernel(5), few.kernel(5).repeat(1, 2, 1))


def test_changes_grow_with_the_learning_rate_and_are_negligible_at_a_tiny_one():
    tiny, small, large = (
        changes_of(model(16, 2), OptimizerConfig(learning_rate=rate, ssm_learning_rate=rate), IDS, steps=2)
        for rate in (1e-12, 1e-5, 1e-3)
    )
    assert all(change < 1e-6 for change in tiny.values())
    assert all(large[watched] > 10 * small[watched] > 0 for watched in tiny)


@pytest.mark.parametrize(
    ("slope", "error", "answer"),
    [(0.1, 0.02, "equal"), (-0.3, 0.02, "different"), (0.1, 0.15, "undecided"), (0.0, 0.15, "undecided")],
)
def test_zero_slope_needs_an_equivalence_test(slope, error, answer):
    assert Coordinate("x", "width", {}, Estimate(slope, error, 5)).answer == answer


def test_coordinate_check_is_written_and_read_back(tmp_path):
    slope = Estimate(0.1, 0.02, 5, "seeds")
    check = Check("completep", [8, 16], [2, 4], 4, 0.1, {"bst": [Coordinate("ffn", "width", {8: 1.0, 16: 1.1}, slope)]})
    check.write(tmp_path)
    assert read_check(tmp_path) == check
    assert check.answer == "passed"
    assert read_check(tmp_path / "elsewhere") is None
