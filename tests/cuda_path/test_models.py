"""Every model on CUDA's code path has the gradients of the CPU's path, under every activation checkpointing policy."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bst_dist.activation import policy as activation
from bst_dist.activation.policy import ActivationCheckpointingConfig
from bst_dist.model.attention import flex, sliding
from tests.cuda_path.models import MODELS, build, tokens

RECURRENT = ("gss", "ssm", "mamba2", "gated-deltanet")
"""Mixers without attention."""
POLICIES = ("none", "every-layer", "every-kth-layer", "selective", "offload")


def gradients(name: str, policy: str = "none") -> list[Tensor]:
    """Return the loss and all gradients."""
    model = build(name)
    model.checkpoint = activation.policy(ActivationCheckpointingConfig(policy=policy), model.layers)
    total = model(*tokens()).total
    total.backward()
    return [total.detach(), *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]


@pytest.mark.parametrize("name", MODELS)
def test_gradients_equal_the_cpu_path_under_every_policy(name, monkeypatch):
    calls = []
    real = flex.flex_sliding_attention
    monkeypatch.setattr(sliding, "flex_sliding_attention", lambda *a: calls.append(1) or real(*a))
    plain = gradients(name)
    assert len(calls) == (1 if MODELS[name]["mixer"] in RECURRENT else 2)  # the sliding layer and the model's own
    for policy in POLICIES[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients(name, policy), plain, strict=True)), policy
    monkeypatch.setattr(sliding, "attention_path", lambda device: "fused-tiles")
    for found, exact in zip(plain, gradients(name), strict=True):
        assert float((found - exact).norm() / exact.norm().clamp_min(1e-6)) < 2e-5
