"""Each activation checkpointing policy gives the same gradients, and keeps the expected bytes between the passes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import pytest
import torch
from torch import Tensor

from bst_dist.activation import policy as activation
from bst_dist.activation import selective
from bst_dist.activation.config import ActivationCheckpointingConfig
from bst_dist.model.config import ModelConfig
from bst_dist.model.lm import LanguageModel
from bst_dist.parallel.sequence.past import EarlierCall
from bst_dist.plan.memory.live import LiveBytes

ROWS, LENGTH, WIDTH, VOCABULARY = 2, 32, 16, 29
INPUT_BYTES = ROWS * LENGTH * WIDTH * 4
"""Bytes of one layer's input in fp32."""
POLICIES = ("none", "every-layer", "every-kth-layer", "selective", "offload")


def build(policy: str, depth: int, variant: str = "SH", every: int = 2) -> LanguageModel:
    torch.manual_seed(0)
    config = ModelConfig(
        width=WIDTH,
        heads=2,
        ffn=64,
        block=8,
        depth=depth,
        mixer="bst",
        vocab_size=VOCABULARY,
        context={"variant": variant, "states": 3},
        ssm={"state": 4, "chunk": 4},
    )
    model = LanguageModel(config)
    model.checkpoint = activation.policy(ActivationCheckpointingConfig(policy=policy, every=every), model.layers)
    return model


def tokens() -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, VOCABULARY, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    return ids[:, :-1], ids[:, 1:]


def gradients(policy: str, variant: str, bf16: bool) -> tuple[list[Tensor], EarlierCall]:
    """Return gradients and past of the second of two calls, which continues the past of the first."""
    model = build(policy, 4, variant)
    left = model.carry()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        model(*tokens(), past=left)
    past = model.carry(left.after, LENGTH)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        total = model(*tokens(), past=past).total
    total.backward()
    return [parameter.grad for parameter in model.parameters()], past


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("variant", ["SH", "MH", "MF"])
@pytest.mark.parametrize("policy", POLICIES[1:])
def test_gradients_and_carried_state_are_bitwise_equal_under_every_policy(policy, variant, bf16):
    expected, left = gradients("none", variant, bf16)
    found, left_again = gradients(policy, variant, bf16)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert left.after.keys() == left_again.after.keys()
    assert all(torch.equal(left.after[name], left_again.after[name]) for name in left.after)


@contextmanager
def counting(model: LanguageModel, *inputs: Tensor) -> Iterator[LiveBytes]:
    """Context manager that counts live bytes, without the model and its inputs."""
    with LiveBytes() as live:
        for tensor in (*model.parameters(), *inputs):
            live.add(tensor)
        live.before = live.mark()
        yield live


@cache
def held(policy: str, depth: int, every: int = 2) -> tuple[int, int]:
    """Return the bytes kept between the passes, and the part of them that the policy keeps in host memory."""
    model = build(policy, depth, every=every)
    ids, labels = tokens()
    with counting(model, ids, labels) as live:
        total = model(ids, labels).total
        between = live.now - live.before
        host = model.checkpoint.host.bytes if policy == "offload" else 0
        total.backward()
    return between, host


def growth(policy: str, every: int = 2) -> tuple[float, float]:
    """Return the bytes that one more layer adds, in all and in host memory, in units of its input."""
    (few, few_host), (many, many_host) = held(policy, 4, every), held(policy, 12, every)
    return (many - few) / 8 / INPUT_BYTES, (many_host - few_host) / 8 / INPUT_BYTES


def test_memory_growth_with_depth_matches_each_policy():
    everything = growth("none")[0]
    assert everything > 20
    assert growth("every-layer") == (pytest.approx(1, abs=0.01), 0)
    assert growth("every-kth-layer")[0] == pytest.approx((everything + 1) / 2, rel=0.01)
    assert growth("every-kth-layer", every=4)[0] == pytest.approx((3 * everything + 1) / 4, rel=0.01)
    assert growth("offload") == (pytest.approx(1, abs=0.01), pytest.approx(1))  # here the device is the host
    assert 1 < growth("selective")[0] < everything / 3


def test_memory_is_freed_after_the_step():
    for policy in POLICIES:
        model = build(policy, 4)
        ids, labels = tokens()
        with counting(model, ids, labels) as live:
            model(ids, labels).total.backward()
            gradients = sum(parameter.grad.nbytes for parameter in model.parameters())
            model.zero_grad()
        assert live.peak - live.before > gradients
        assert live.now - live.before < INPUT_BYTES / 8, policy
        if policy == "offload":
            assert model.checkpoint.host.bytes == 0


@pytest.mark.long
def test_96_layers_train_alike_under_every_policy_in_the_memory_planned():
    def train(policy: str) -> tuple[list[float], int]:
        model = build(policy, 96)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        ids, labels = tokens()
        first = model(ids, labels).total
        first.backward()
        optimizer.step()
        optimizer.zero_grad()
        ids, labels = tokens()
        with counting(model, ids, labels) as live:
            second = model(ids, labels).total
            between = live.now - live.before
        return [float(first.detach()), float(second.detach())], between

    expected, _ = train("none")
    assert expected[1] < expected[0]
    for policy in POLICIES[1:]:
        losses, between = train(policy)
        assert losses == expected, policy
        planned = held(policy, 4)[0] + 92 * growth(policy)[0] * INPUT_BYTES
        assert between == pytest.approx(planned, rel=0.01), policy


def test_selective_keeps_narrow_products_and_recomputes_wide_ones():
    x, narrow, wide = torch.randn(4, 8), torch.randn(8, 2), torch.randn(8, 32)
    keep, give = selective.contexts()
    with keep:
        kept, _ = x @ narrow, x @ wide
    with give:
        assert torch.equal(x @ torch.zeros(8, 2), kept)
        assert torch.equal(x @ torch.zeros(8, 32), torch.zeros(4, 32))


def test_evaluation_keeps_no_activations():
    for policy in POLICIES:
        model = build(policy, 4)
        ids, labels = tokens()
        with torch.no_grad(), counting(model, ids, labels) as live:
            losses = model(ids, labels)
            del losses
        assert live.now - live.before < INPUT_BYTES, policy
