"""Arithmetic peaks: what a rank could do, against which what it does is measured.

Known accelerators have their vendor's dense figure (no structured sparsity); anything else is measured with one large
matrix product, at start, on all ranks at once.
"""

from __future__ import annotations

import time

import torch

from bst_dist.plan.accelerators import of_device


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Peak FLOP/s of one rank's device in matrix products of `dtype` (bfloat16 or float32)."""
    if device.type == "cuda":
        known = of_device(torch.cuda.get_device_name(device))
        if known:
            return 1e12 * (known.bf16_tflops if dtype == torch.bfloat16 else known.fp32_tflops)
    return measured_flops(device, dtype)


def measured_flops(device: torch.device, dtype: torch.dtype, size: int = 1024, for_s: float = 0.3) -> float:
    """The best of several products of square matrices, in FLOP/s; takes about `for_s` seconds."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.float32).to(dtype) for _ in range(2))
    (a @ b).sum().item()  # the first product also sets up the library
    best, end = float("inf"), time.perf_counter() + for_s
    while best == float("inf") or time.perf_counter() < end:  # once at least, however busy the machine
        start = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
