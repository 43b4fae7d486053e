"""The time model: which rate each term is computed at, and which communication is hidden."""

from __future__ import annotations

import pytest

from bst_dist.model.config import MIXER_SECTIONS, ModelConfig
from bst_dist.plan import speed
from bst_dist.plan.accelerators import accelerator
from bst_dist.plan.flops import forward_flops
from bst_dist.plan.memory.zero import Strategy
from bst_dist.plan.traffic import GATHER, MOMENTUM, REDUCE, SCATTER

DEVICE = accelerator("h100-80gb", None)
STATES = {"ssm": "ssm", "mamba2": "ssm", "gated-deltanet": "delta", "gss": "ssm"}
"""Mixers whose state is computed in single precision, whatever the autocast, and its term of the FLOPs."""


@pytest.mark.parametrize("mixer", MIXER_SECTIONS)
def test_states_in_single_precision_are_planned_at_its_rate(mixer):
    config = ModelConfig(width=64, heads=4, ffn=128, block=64, depth=1, vocab_size=50, mixer=mixer)
    flops = forward_flops(config, 4096)
    single = {term for term in flops if term in speed.SINGLE_PRECISION}
    assert single == ({STATES[mixer]} if mixer in STATES else {"ssm"} if mixer in ("bst", "bst-joint") else set())
    one = {name: (count if name in single else 0.0) for name, count in flops.items()}
    seconds, _ = speed._forward_seconds(one, 1000, DEVICE, bf16=True)
    expected = 1000 * sum(one.values()) / (1e12 * DEVICE.fp32_tflops * speed.SINGLE_EFFICIENCY)
    assert seconds == pytest.approx(expected)


@pytest.mark.parametrize(
    ("stage", "waits", "exposed"),
    [
        (3, {GATHER: 3.0}, 0.0),  # behind a forward pass of 1 s and a backward pass of 2 s
        (3, {GATHER: 3.5}, 0.5),
        (3, {SCATTER: 2.5}, 0.5),  # gradients exist only in the backward pass
        (3, {GATHER: 1.0, SCATTER: 2.0}, 0.0),
        (3, {GATHER: 1.5, SCATTER: 2.0, MOMENTUM: 4.0}, 4.5),
        (2, {REDUCE: 2.5, GATHER: 1.0}, 1.5),  # the weights of stage 2 are gathered in the update
        (1, {REDUCE: 2.5, GATHER: 1.0}, 3.5),
    ],
)
def test_zero3_gathers_behind_both_passes_and_gradients_behind_the_backward_pass(stage, waits, exposed):
    strategy = Strategy("any", stage, overlap_comm=stage > 1)
    assert speed._exposed(waits, 1.0, 0.0, strategy) == pytest.approx(exposed)
