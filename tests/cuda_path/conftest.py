"""Run the code path of CUDA on a CPU: FlexAttention through the compiler's front end and autograd, without kernels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.attention.flex_attention as torch_flex

from bst_dist.model import loss
from bst_dist.model.attention import flex, sliding


@pytest.fixture(autouse=True)
def cuda_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Select attention's CUDA path. The compiler traces forward and backward; the traces run as plain operators."""
    monkeypatch.setattr(sliding, "attention_path", lambda device: "flex")
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *inputs: None)  # it refuses gradients on a CPU
    monkeypatch.setattr(flex, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    for module in (flex, loss):
        module._compiled.cache_clear()
