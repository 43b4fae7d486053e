"""The programs of layers for a GPU: they compile to machine code for sm_90, with few launches and little traffic."""

from __future__ import annotations

import json

import pytest
import torch

if torch.version.cuda is None:
    pytest.skip("needs a torch built with CUDA: make test-sm90", allow_module_level=True)

from tests.sm90.layers import COUNTS, LAYERS, Attention, count
from tests.sm90.lowering import SHARED_MEMORY, copied_operands, lower, pretended_h100, trace

COMMITTED = json.loads(COUNTS.read_text())
MOST = 100
"""Most launches of a layer with window and context states, both passes together."""
MOST_BYTES = 12e9
"""Most bytes that such a layer reads and writes, with D 1024 and eight rows of 4,096 tokens."""


@pytest.mark.parametrize("name", COMMITTED)
def test_sm90_machine_code_of_a_layer_has_the_recorded_counts(name):
    found = count(name)
    assert found["shared_bytes"] <= SHARED_MEMORY
    assert found == COMMITTED[name], "after a change that is meant, put what is found into tests/sm90/counts.json"


WITHIN = [
    "BST-SH",
    "BST-SH, T5",
    "BST-SH, documents",
    "BST-SH, masked documents",
    "BST-SH, T5, masked documents",
    "BST-SH, large",
    "BST-SH, large, masked documents",
    "BST-MF, masked documents",
    "joint",
    "joint, masked documents",
]


@pytest.mark.parametrize("name", WITHIN)
def test_a_layer_with_window_and_states_has_few_launches(name):
    found = COMMITTED[name]
    assert sum(found["launches"].values()) <= MOST
    assert not found["fallbacks"]


@pytest.mark.parametrize("name", ["BST-SH", "BST-SH, T5", "BST-SH, documents", "BST-SH, large"])
def test_an_sh_layer_has_a_kernel_for_each_of_its_attentions(name):
    kinds = COMMITTED[name]["kinds"]
    assert kinds["flex"] == 2  # FlexAttention's own kernel in each pass
    assert kinds["flash"] == 2  # torch's flash attention in each pass, for cross-attention


def test_with_masked_documents_states_use_flex_attention_too():
    kinds = COMMITTED["BST-SH, masked documents"]["kinds"]
    assert (kinds["flex"], kinds["flash"]) == (4, 0)


@pytest.mark.parametrize("name", ["BST-SH", "BST-SH, masked documents", "BST-MF", "joint", "pure SSM", "GSS"])
def test_products_need_no_copies_of_their_operands(name):
    """On an H200, 6 % of the time of a BST-SH layer was spent in copies that torch makes before a product."""
    graphs = trace(LAYERS[name].compute)
    with pretended_h100():
        assert not [one for graph in graphs for one in copied_operands(lower(graph).code)]


@pytest.mark.parametrize("name", COMMITTED)
def test_no_kernel_uses_atomic_additions(name):
    """Atomic additions sum bf16 numbers in no fixed order, and are slow if many threads add to one address."""
    assert COMMITTED[name]["atomics"] == 0


@pytest.mark.parametrize("name", COMMITTED)
def test_kernels_in_double_precision_are_combined_only_with_each_other(name):
    """All parts of a combined kernel have the registers of the largest: a cast beside a table took twice its time."""
    assert COMMITTED[name]["mixed"] == 0


@pytest.mark.parametrize("name", ["BST-SH, large", "BST-SH, large, masked documents"])
def test_powers_of_transitions_are_computed_once(name):
    """A kernel of the scan over chunks has a million numbers. Computing their factors in it took 30 million sines."""
    sines = COMMITTED[name]["sines"]
    assert sines["forward"] <= 200_000
    assert sines["backward"] <= 20_000  # of the transition and B̄ of each mode


@pytest.mark.parametrize("gradients", [True, False])
def test_heads_narrower_than_16_have_programs(gradients):
    """The mini sweeps have heads of 4, and Inductor's FlexAttention refuses fewer than 16 channels."""
    graphs = trace(Attention(gradients=gradients, bias=True, head=4).compute)
    with pretended_h100():
        assert all("flex_attention" in lower(graph).code for graph in graphs)


def test_a_large_sh_layer_moves_few_bytes():
    assert sum(COMMITTED["BST-SH, large"]["bytes"].values()) <= MOST_BYTES


def test_few_layers_need_fallback_operators_of_torch():
    """Inductor has no kernels for FFTs, complex numbers and triangular systems."""
    needing = {name for name, found in COMMITTED.items() if found["fallbacks"]}
    assert needing == {"BST-SH, hyena", "BST-SH, explicit", "BST-SH, S4", "Gated DeltaNet"}
