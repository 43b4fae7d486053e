"""Which parameters keep single precision when a model is exported or loaded in 16 bits."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

import bst_dist.hub  # noqa: F401 (registers the model with transformers)
from bst_dist.checkpoint.exporting import DTYPES
from bst_dist.cli import main
from bst_dist.parallel.sequence.past import Past
from bst_dist.study.evaluation.trained import open_run

KERNELS = [
    {"kernel": "s4d"},
    {"kernel": "s4-dplr"},
    {"kernel": "explicit", "length": 512},
    {"kernel": "hyena", "length": 512},
    {"kernel": "ssd", "head": 4},
    {"kernel": "none"},
]


def outputs(model) -> torch.Tensor:
    """Return what the kernel of the first BST layer makes of random inputs."""
    kernel = model.layers[1].mixer.cross.context.ssm
    return kernel(torch.randn(2, 512, 4, generator=torch.Generator().manual_seed(1)), Past())


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel["kernel"])
@torch.no_grad()
def test_an_export_in_16_bits_changes_a_kernel_by_rounding_only(exported, tmp_path, kernel, dtype):
    run_dir, folder = exported("--dtype", dtype, ssm=kernel)
    expected, eps = outputs(open_run(run_dir).model), torch.finfo(DTYPES[dtype]).eps
    assert main(["import", str(folder), str(tmp_path / "back")]) == 0
    for loaded in (
        AutoModelForCausalLM.from_pretrained(folder).model,
        AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype]).model,
        open_run(tmp_path / "back").model,
    ):
        change = float((outputs(loaded) - expected).norm() / expected.norm())
        assert change < eps / 2
