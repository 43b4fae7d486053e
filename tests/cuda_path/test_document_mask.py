"""Documents that begin at any token, on CUDA's code path."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from bst_dist.activation import policy as activation
from bst_dist.activation.config import ActivationCheckpointingConfig
from bst_dist.model.attention import flex, sliding
from bst_dist.model.document_mask import Borders
from tests.cuda_path.models import LENGTH, VOCABULARY, build, tokens

BEGINS = torch.zeros(2, LENGTH, dtype=torch.bool)
BEGINS[0, [3, 4, 64, 100, 200]] = True
BEGINS[1, [0, 130, 255]] = True


def gradients(name: str, starts: Borders, compiled: bool = False, policy: str = "none") -> list[Tensor]:
    """Return the loss and the gradients."""
    model = build(name)
    model.checkpoint = activation.policy(ActivationCheckpointingConfig(policy=policy), model.layers)
    for layer in model.layers:
        layer.compiled = compiled
    total = model(*tokens(), starts=starts).total
    total.backward()
    return [total.detach(), *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]


def worst(found: list[Tensor], exact: list[Tensor]) -> float:
    return max(float((a - b).norm() / b.norm().clamp_min(1e-6)) for a, b in zip(found, exact, strict=True))


def expected(name: str) -> list[Tensor]:
    """Return the same with attention in plain tiles, which other tests compare with each document alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sliding, "attention_path", lambda device: "tiles")
        return gradients(name, Borders.of(BEGINS))


@pytest.mark.parametrize("name", ["sliding T5", "SH RoPE", "MF", "SH joint", "Transformer-XL", "full RoPE"])
def test_flex_losses_and_gradients_equal_those_of_tiles(name):
    assert worst(gradients(name, Borders.of(BEGINS)), expected(name)) < 1e-5


@pytest.mark.parametrize(("name", "policy"), [("SH", "none"), ("MF", "every-layer"), ("SH", "selective")])
def test_a_compiled_layer_is_one_whole_graph_with_the_same_gradients(name, policy):
    assert worst(gradients(name, Borders.of(BEGINS), compiled=True, policy=policy), expected(name)) < 1e-5


def test_selective_checkpointing_has_the_same_gradients():
    assert worst(gradients("SH", Borders.of(BEGINS), policy="selective"), expected("SH")) < 1e-5


def test_tokens_of_other_documents_have_no_effect():
    model, ids, own = build("SH RoPE"), tokens()[0], slice(100, 200)
    for layer in model.layers:
        layer.compiled = True
    changed = (ids + 5) % VOCABULARY
    changed[0, own] = ids[0, own]
    one, other = (model.hidden(rows, starts=Borders.of(BEGINS)) for rows in (ids, changed))
    assert torch.equal(one[0, own], other[0, own])
    assert not torch.equal(one[0, own.stop :], other[0, own.stop :])


def test_one_graph_serves_all_border_counts_of_one_table_size(monkeypatch):
    """A larger table of borders needs one more graph, for the layer with an SSM."""
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(flex, "BACKEND", counter)
    model = build("SH")
    for layer in model.layers:
        layer.compiled = True
    graphs = []
    for count in (0, 1, 4):
        begins = torch.zeros(2 * LENGTH, dtype=torch.bool)
        begins[:count] = True
        model(*tokens(), starts=Borders.of(begins.view(2, LENGTH)))
        graphs.append(counter.frame_count)
    assert graphs == [2, 2, 3]
