"""The path that CUDA takes, run on a CPU: FlexAttention through the compiler's front end and autograd, no kernels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.attention.flex_attention as torch_flex

from bst_dist.model import attention, flex


@pytest.fixture(autouse=True)
def cuda_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention as on CUDA. The compiler traces forward and backward; what it traced runs in plain operators."""
    monkeypatch.setattr(attention, "attention_path", lambda device: "flex")
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *inputs: None)  # it refuses gradients on a CPU
    monkeypatch.setattr(flex, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    flex._compiled.cache_clear()
