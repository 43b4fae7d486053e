"""Initial values and optimizer groups of every mixer and kernel, compared with explicit lists of names."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from bst_dist.model.config import ModelConfig
from bst_dist.model.layers import MIXERS
from bst_dist.model.lm import LanguageModel
from bst_dist.model.roles import single_precision

DEPTH, WIDTH = 3, 64
SETTINGS = {
    "context": {"states": 3},
    "ssm": {"state": 4, "chunk": 4},
    "block_recurrent": {"states": 3},
    "transformer_xl": {"window": 8},
    "mamba2": {"head": 8},
}
KERNELS = {
    "s4d": {"log_dt", "log_decay", "frequency"},
    "s4-dplr": {"log_dt", "log_decay", "frequency", "low_rank", "into"},
    "explicit": {"log_decay"},
    "hyena": {"log_decay"},
    "ssd": {"scan.log_decay", "scan.step"},
    "none": set(),
}
"""Parameters of each kernel's dynamics."""
OF_MIXER = {"mamba2": {"scan.log_decay", "scan.step"}, "gated-deltanet": {"rule.log_decay", "rule.step"}}
"""Dynamics of mixers with their own recurrence."""


def make(mixer="bst", **changes) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(
        ModelConfig(
            width=WIDTH,
            heads=4,
            ffn=WIDTH,
            block=8,
            depth=DEPTH,
            vocab_size=30,
            mixer=mixer,
            placement=[0],
            **(SETTINGS | changes),
        )
    )


def named_groups(model: LanguageModel) -> dict[str, set[str]]:
    names = {id(p): name for name, p in model.named_parameters()}
    return {group: {names[id(p)] for p in members} for group, members in model.parameter_groups().items()}


def with_kernel(kernel: str) -> LanguageModel:
    sizes = {"explicit": {"length": 8}, "hyena": {"length": 8, "hidden": 8}, "ssd": {"head": 4}, "none": {}}
    return make(ssm={"kernel": kernel, **sizes.get(kernel, {"state": 4, "chunk": 4})})


@pytest.mark.parametrize("mixer", MIXERS)
def test_only_maps_into_the_residual_stream_start_smaller(mixer):
    for name, module in make(mixer).layers.named_modules():
        if isinstance(module, nn.Linear):
            into_stream = name.split(".", 1)[1] in ("mixer.out", "ffn.out")
            expected = (1 / math.sqrt(2 * DEPTH) if into_stream else 1) / math.sqrt(module.in_features)
            assert float(module.weight.detach().std()) == pytest.approx(expected, rel=0.15), name


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_dynamics_of_each_kernel_have_a_group_of_their_own(kernel):
    groups = named_groups(with_kernel(kernel))
    assert groups["ssm"] == {f"layers.0.mixer.cross.context.ssm.{name}" for name in KERNELS[kernel]}


@pytest.mark.parametrize("kernel", KERNELS)
def test_dynamics_and_networks_that_compute_a_filter_keep_single_precision(kernel):
    model, place = with_kernel(kernel), "layers.0.mixer.cross.context.ssm."
    every = {name.removeprefix(place) for name, _ in model.named_parameters() if name.startswith(place)}
    kept = single_precision(model)
    assert set(kept) == {place + name for name in (every if kernel == "hyena" else KERNELS[kernel])}
    assert all(parameter is model.get_parameter(name) for name, parameter in kept.items())


@pytest.mark.parametrize("mixer", MIXERS)
def test_the_matrices_group_holds_exactly_the_linear_maps(mixer):
    model = make(mixer)
    groups = named_groups(model)
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    keys = {name for name, _ in model.named_parameters() if name.endswith("context.key_value")}  # not an nn.Linear
    assert groups["matrices"] == linear | keys
    if mixer in OF_MIXER:
        assert groups["ssm"] == {f"layers.0.mixer.{name}" for name in OF_MIXER[mixer]}


def test_parameter_roles_survive_copies_and_the_meta_device():
    for mixer in MIXERS:
        model = make(mixer)
        assert named_groups(copy.deepcopy(model)) == named_groups(model)
        assert named_groups(make(mixer).to("meta").to_empty(device="cpu")) == named_groups(model)


def test_shared_modes_are_one_set_for_all_channels():
    ssm = make("gss").layers[0].mixer.ssm
    assert ssm.log_decay.shape == ssm.frequency.shape == (1, 1, 2)
    assert ssm.log_dt.shape == (1, WIDTH // 4)
    assert torch.equal(ssm.frequency[0, 0], torch.tensor([0.0, math.pi]))  # S4D-Lin
