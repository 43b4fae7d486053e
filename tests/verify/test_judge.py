from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bst_dist.verify.cause import likely_cause
from bst_dist.verify.grid import Combination, axes_in_common
from bst_dist.verify.judge import ErrorLimits, judge
from bst_dist.verify.reference import Step

GENERATOR = torch.Generator().manual_seed(0)
NAMES = ("layers.0.mixer.qkv", "layers.0.mixer.out", "layers.1.ffn.up")
EXACT = {name: torch.randn(20, generator=GENERATOR, dtype=torch.float64) for name in NAMES}
HOW = Combination("SH", "fp32", "ds_configs/zero2.json", sp=2, checkpointing="none", accumulation=8)


def step(gradients: dict[str, torch.Tensor], loss: float = 3.0) -> Step:
    return Step(loss, float(torch.cat(list(gradients.values())).norm()), gradients)


def noisy(size: float) -> Step:
    return step(
        {
            name: g + size * g.norm() / 20**0.5 * torch.randn(20, generator=GENERATOR, dtype=torch.float64)
            for name, g in EXACT.items()
        }
    )


@pytest.mark.parametrize("size", [1e-7, 1e-2, 1e-1])
def test_rounding_errors_like_those_of_one_process_pass(size):
    limits = ErrorLimits.of(step(EXACT), [noisy(size), noisy(size)])
    assert judge(noisy(size), limits).passed
    assert not judge(noisy(8 * size), limits).passed


def test_small_gradients_are_judged_by_the_same_parameter_of_other_layers():
    """The error of one process is a sample of two numbers, which may be almost 0 by chance."""
    exact = {f"layers.{layer}.{name}": torch.ones(2).double() for layer in (0, 1) for name in ("scale", "bias")}
    exact["embedding"] = torch.ones(10_000).double()  # all gradients together are nearly exact

    def off(**by: float) -> Step:
        return step({name: g * (1 + by.get(name.replace(".", "_"), 1e-3)) for name, g in exact.items()})

    limits = ErrorLimits.of(step(exact), [off(layers_0_scale=2e-2)])
    assert judge(off(layers_1_scale=4e-2), limits).passed
    assert judge(off(layers_1_bias=4e-2), limits).wrong == ("layers.1.bias",)  # no other layer's bias has this error
    assert judge(off(layers_1_scale=0.5), limits).wrong == ("layers.1.scale",)


@pytest.mark.parametrize("factor", [2, 4, 8, 1 / 2, 1 / 4])
def test_a_wrong_factor_fails_at_low_precision(factor):
    limits = ErrorLimits.of(step(EXACT), [noisy(0.3)])
    found = judge(step({name: g * factor for name, g in noisy(0.05).gradients.items()}), limits)
    assert not found.passed
    assert set(found.wrong) == set(NAMES)


@pytest.mark.parametrize(
    ("factor", "said"),
    [
        (2, "= sp: summed over the ranks that share a sequence"),
        (4, "= dp: summed over data-parallel ranks"),
        (1 / 2, "= 1/sp: averaged over the ranks that share a sequence"),
        (1 / 8, "= 1/ranks = 1/micro-batches: "),
        (1.5, "no number of ranks or micro-batches"),
    ],
)
def test_a_wrong_factor_is_explained(factor, said):
    limits = ErrorLimits.of(step(EXACT), [noisy(1e-7)])
    found = judge(step({name: g * factor for name, g in EXACT.items()}), limits)
    assert said in likely_cause(HOW, 8, found, ranks_agree=True)


def test_the_wrong_parameter_nearest_to_the_loss_is_named():
    limits = ErrorLimits.of(step(EXACT), [noisy(1e-7)])
    found = judge(step({n: g * (0.9 if "mixer" in n else 1) for n, g in EXACT.items()}), limits)
    assert found.wrong == NAMES[:2]
    assert found.parameter in NAMES[:2]
    said = likely_cause(HOW, 8, found, ranks_agree=True)
    assert "2 gradients are wrong; the one nearest to the loss is layers.0.mixer.out" in said
    assert "With sp 2, check the communication" in said


def test_nan_gradients_fail():
    limits = ErrorLimits.of(step(EXACT), [noisy(1e-7)])
    found = judge(step({**EXACT, NAMES[1]: EXACT[NAMES[1]] * float("nan")}), limits)
    assert not found.passed
    assert found.parameter == NAMES[1]
    assert "not a number" in likely_cause(HOW, 8, found, ranks_agree=True)


def test_a_wrong_loss_or_norm_fails_with_correct_gradients():
    limits = ErrorLimits.of(step(EXACT), [noisy(1e-7)])
    for wrong in (step(EXACT, loss=3.1), replace(step(EXACT), norm=1.0)):
        found = judge(wrong, limits)
        assert not found.passed
        assert "reported loss or norm" in likely_cause(HOW, 8, found, ranks_agree=True)


def test_zero_gradients_may_differ_by_rounding():
    exact = step({**EXACT, "unused": torch.zeros(3, dtype=torch.float64)})
    limits = ErrorLimits.of(exact, [step({**noisy(1e-7).gradients, "unused": torch.full((3,), 1e-14)})])
    assert judge(step({**noisy(1e-7).gradients, "unused": torch.full((3,), -1e-14)}), limits).passed
    assert not judge(step({**noisy(1e-7).gradients, "unused": torch.full((3,), 1e-3)}), limits).passed


def test_settings_common_to_failures_only_are_found():
    failed = [HOW, replace(HOW, precision="bf16")]
    passed = [replace(HOW, sp=1), replace(HOW, deepspeed="ds_configs/zero1.json", sp=1)]
    assert list(axes_in_common(failed, passed)) == [("sp", 2)]
