"""Models without storage have the shapes of a real model, do not load torch's compiler, and do not break it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from bst_dist.model.config import MIXER_SECTIONS, ModelConfig
from bst_dist.model.lm import LanguageModel
from bst_dist.model.meta_device import weightless


@pytest.mark.parametrize("mixer", MIXER_SECTIONS)
def test_a_weightless_model_has_the_shapes_of_one_with_weights(mixer):
    config = ModelConfig(vocab_size=19, width=64, heads=2, ffn=24, block=8, depth=2, mixer=mixer)
    state = torch.get_rng_state()
    with weightless():
        model = LanguageModel(config)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.is_meta for parameter in model.parameters())
    found, expected = (
        {name: (p.shape, p.dtype) for name, p in one.state_dict().items()} for one in (model, LanguageModel(config))
    )
    assert found == expected


def run(program: str) -> None:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_weightless_does_not_load_the_compiler_but_it_works_afterwards():
    run(
        """
import sys
import torch
from bst_dist.model.meta_device import weightless

def counted():
    return torch.arange(3, dtype=torch.float64, device="meta") * 2

with weightless():
    counted()
assert "torch._dynamo" not in sys.modules
counted()  # without it torch loads its compiler here
assert sys.modules["torch._dynamo"].__file__
compiled = torch.compile(lambda x: torch.sin(x) + 1, backend="eager", fullgraph=True)
assert torch.equal(compiled(torch.ones(3)), torch.sin(torch.ones(3)) + 1)
"""
    )


def test_the_compiler_can_be_imported_within_weightless():
    run(
        """
import sys
from bst_dist.model.meta_device import weightless

with weightless():
    import torch._dynamo.eval_frame
    assert sys.modules["torch._dynamo"].__file__
    assert torch._dynamo.optimize
assert sys.modules["torch._dynamo"].__file__
"""
    )
