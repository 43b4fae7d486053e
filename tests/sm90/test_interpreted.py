"""The programs for a GPU compute the right numbers: they are run by Triton's interpreter on a CPU."""

from __future__ import annotations

import math

import pytest
import torch

if torch.version.cuda is None:
    pytest.skip("needs a torch built with CUDA: make test-sm90", allow_module_level=True)

from tests.sm90.running import passes

NAMES = [
    "sliding, T5",
    "sliding, T5, documents",
    "BST-SH",
    "BST-SH, T5",
    "BST-SH, documents",
    "BST-SH, masked documents",
    "BST-MF",
    "BST-MF, documents",
    "BST-MF, masked documents",
    "joint",
    "joint, masked documents",
    "full, T5",
    "full, documents",
    "Transformer-XL",
    "Transformer-XL, documents",
    "GSS",
    "Mamba-2",
    "Block-Recurrent",
    "attention, no gradients",
    "attention, no gradients, documents",
    "attention, past, documents",
]
ROUNDING = {"bf16": 0.06, "fp32": 1e-4}
"""Largest relative error by precision; both sides only differ in the order of sums. A GPU runs the bf16 programs. The
fp32 programs are the same without the casts, and there rounding can hide almost no error."""


@pytest.mark.parametrize("precision", ROUNDING)
@pytest.mark.parametrize("name", NAMES)
def test_generated_programs_equal_their_graphs_in_plain_torch(name, precision, tmp_path):
    for one in passes(name, tmp_path, precision == "bf16"):
        errors = one.errors()
        print(name, precision, "backward" if one.backward else "forward", len(errors), f"{max(errors):.1e}")
        assert not any(math.isnan(error) for error in errors)
        assert max(errors) < ROUNDING[precision]
