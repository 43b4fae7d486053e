"""Activations of a layer on fake tensors, compared with what autograd saves in a real layer."""

from dataclasses import replace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from bst_dist.activation.config import ActivationCheckpointingConfig
from bst_dist.model.config import ModelConfig
from bst_dist.model.lm import LanguageModel
from bst_dist.parallel.sequence.past import Past
from bst_dist.plan.memory.activations import Activations
from bst_dist.plan.memory.parts import Slice

ROWS, LENGTH, WIDTH = 2, 64, 32


def model(variant: str = "SH") -> ModelConfig:
    return ModelConfig(
        width=WIDTH,
        heads=4,
        ffn=128,
        block=16,
        depth=4,
        vocab_size=50,
        mixer="bst",
        placement=[1, 3],
        context={"variant": variant, "states": 4},
        ssm={"state": 8, "chunk": 8},
    )


def keeping(policy: str) -> ActivationCheckpointingConfig:
    return ActivationCheckpointingConfig(policy=policy)


@pytest.mark.parametrize("variant", ["SH", "MH", "MF"])
@pytest.mark.parametrize("bf16", [False, True])
def test_planned_activations_equal_those_saved_by_autograd(variant, bf16):
    config = model(variant).model_copy(update={"depth": 1, "placement": "all"})
    layer = LanguageModel(config).layers[0]
    x = torch.randn(ROWS, LENGTH, WIDTH, requires_grad=True)
    saved: dict[int, tuple[torch.UntypedStorage, int]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = (storage, storage.nbytes())
        return tensor

    own = {p.untyped_storage()._cdata for p in layer.parameters()}
    with saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        y = layer(x, Past())
    kept = sum(size for key, (_, size) in saved.items() if key not in own)
    assert y.requires_grad
    part = Activations(model(variant), bf16, fused=False).layer(
        "bst", keeping("none"), Slice(ROWS, LENGTH), zero3=False
    )
    assert part.kept == pytest.approx(kept, rel=0.02)  # custom functions also keep scalars and masks in other ways


def test_attention_is_planned_as_a_fused_kernel_by_default():
    """As on a GPU: it keeps its inputs, its output and one number per query, but no scores."""
    plain, fused, other = (
        Activations(model(), True, **given).layer("sliding", keeping("none"), Slice(ROWS, LENGTH), zero3=False).kept
        for given in ({}, {"fused": True}, {"fused": False})
    )
    assert plain == fused < other


def test_recomputed_layer_keeps_only_its_input():
    activations = Activations(model(), bf16=True)
    part = activations.layer("bst", keeping("every-layer"), Slice(ROWS, LENGTH), zero3=False)
    assert part.kept == 4 * ROWS * LENGTH * WIDTH
    whole = activations.layer("bst", keeping("none"), Slice(ROWS, LENGTH), zero3=False)
    assert part.backward > whole.backward  # it recomputes what it does not keep


def test_offloaded_inputs_are_in_host_memory():
    part = Activations(model(), bf16=True).layer("sliding", keeping("offload"), Slice(ROWS, LENGTH), zero3=False)
    assert part.host == 4 * ROWS * LENGTH * WIDTH


def test_activations_are_extrapolated_from_few_rows_and_tokens(monkeypatch):
    monkeypatch.setattr("bst_dist.plan.memory.activations.GPU_TILE_LOGITS", 50 * 16)  # 16 tokens per tile
    activations = Activations(model(), bf16=True)
    direct = activations._layer("bst", keeping("selective"), Slice(5, LENGTH), zero3=False)
    follows = activations.layer("bst", keeping("selective"), Slice(5, LENGTH), zero3=False)
    assert replace(follows, backward=direct.backward) == direct
    assert follows.backward == pytest.approx(direct.backward, rel=0.05)  # few rows may peak at another moment
    monkeypatch.setattr("bst_dist.plan.memory.activations.REHEARSED_TILES", 12)
    assert activations.head(Slice(5, LENGTH)) == activations._head(5 * LENGTH)
    monkeypatch.setattr("bst_dist.plan.memory.activations.GPU_TILE_LOGITS", 50 * 20)  # tiles that are not whole blocks
    assert activations.head(Slice(5, LENGTH)) == activations._head(5 * LENGTH)


def test_messages_of_a_slice_do_not_depend_on_its_length():
    activations = Activations(model(), bf16=True)
    assert activations.messages(Slice(1, 32, 2)) == activations.messages(Slice(1, 64, 2))
    assert activations.messages(Slice(1, 64)) == {}
