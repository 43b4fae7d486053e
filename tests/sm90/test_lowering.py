"""What a GPU would be given to run: the programs of layers, their machine code for sm_90, and how many launches."""

from __future__ import annotations

import json

import pytest
import torch

if torch.version.cuda is None:
    pytest.skip("needs a torch built with CUDA: make test-sm90", allow_module_level=True)

from tests.sm90.layers import COUNTS, count
from tests.sm90.lowering import SHARED_MEMORY

COMMITTED = json.loads(COUNTS.read_text())
MOST = 100
"""Launches of a BST-SH layer, both passes together."""


@pytest.mark.parametrize("name", COMMITTED)
def test_a_layer_becomes_machine_code_for_sm_90_with_the_launches_that_are_written_down(name):
    found = count(name)
    assert found["shared_bytes"] <= SHARED_MEMORY
    assert found == COMMITTED[name], "after a change that is meant, put what is found into tests/sm90/counts.json"


@pytest.mark.parametrize("name", ["BST-SH", "BST-SH, T5", "BST-SH, documents", "BST-SH, large"])
def test_an_sh_layer_has_few_launches(name):
    found = COMMITTED[name]
    assert sum(found["launches"].values()) <= MOST
    assert found["kinds"]["flex"] == 2  # FlexAttention's own kernel in each pass
    assert found["kinds"]["flash"] == 2  # torch's, of cross-attention


def test_few_layers_need_operators_of_torch_beside_products_and_attention():
    """FFTs, complex numbers and triangular systems have no kernels of Inductor's."""
    needing = {name for name, found in COMMITTED.items() if found["fallbacks"]}
    assert needing == {"BST-SH, hyena", "BST-SH, explicit", "BST-SH, S4", "Gated DeltaNet"}
