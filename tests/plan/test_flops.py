"""Analytic FLOP counts compared with torch's counter, which counts every matmul of the plain attention path."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bst_dist.model.config import ModelConfig
from bst_dist.model.lm import LanguageModel
from bst_dist.plan.flops import forward_flops

pytestmark = pytest.mark.usefixtures("plain_attention")


def config(mixer, variant, **context):
    return ModelConfig(
        width=64, heads=4, ffn=128, block=32, depth=2, mixer=mixer, placement=[1], vocab_size=50,
        context={"variant": variant, "states": 4, **context}, ssm={"state": 8, "chunk": 16},
    )  # fmt: skip


@pytest.mark.parametrize("case", [("sliding", "SH"), ("bst", "SH"), ("bst", "MH"), ("bst", "MF")])
def test_forward_flops_equal_those_of_the_torch_counter(case):
    model, length, rows = LanguageModel(config(*case)), 128, 64
    ids = torch.zeros(rows, length, dtype=torch.long)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(ids, ids)
    counted = counter.get_total_flops() / ids.numel()
    expected = sum(forward_flops(model.config, length).values())
    assert counted == pytest.approx(expected, rel=2e-3)  # the tables of the SSM, amortised over the batch
