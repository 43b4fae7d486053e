"""Whether bf16 is slow on this CPU does not depend on the CPU's load."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from bst_dist.plan.hardware import bf16_slowdown


@pytest.fixture
def busy_cores():
    """Run eight programs that compute all the time."""
    programs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(8)]
    yield
    for program in programs:
        program.kill()
        program.wait()


def test_slow_bf16_is_detected_independently_of_cpu_load(busy_cores, monkeypatch):
    """Simulates a CPU on which a product in bf16 takes as long as twenty in fp32."""
    single = torch.randn(128, 128)

    def product(a: torch.Tensor, b: torch.Tensor) -> None:
        for _ in range(20 if a.dtype == torch.bfloat16 else 1):
            torch.mm(single, single)

    monkeypatch.setattr(torch.Tensor, "__matmul__", product)
    threads = torch.get_num_threads()
    assert 5 < bf16_slowdown() < 80
    assert torch.get_num_threads() == threads
