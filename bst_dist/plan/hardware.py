"""Speed of a device in matrix products: the peak used for MFU, and whether bf16 is faster than fp32.

Known accelerators have their vendor's dense figure (no structured sparsity). Other accelerators are measured with one
large matrix product at start. A CPU has no peak, because its speed depends on what else runs on its cores.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from bst_dist.plan.accelerators import of_device

MEASURED_SIZE, MEASURED_S = 4096, 0.3
"""Rows of the square matrices with which an unknown accelerator is measured, and for how many seconds. One product
takes 0.14 ms at 1 PFLOP/s, well above the time to launch it and to wait for it."""
SLOW_BF16 = 2.0
"""bf16 counts as slow if a product takes at least this many times as long as in fp32."""


def device_name(device: torch.device) -> str:
    """Return the driver's name of a CUDA device, else the device type, such as `cpu`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Return the peak FLOP/s of one rank's device in matrix products of `dtype` (bfloat16 or float32); NaN on a CPU."""
    if device.type == "cpu":
        return float("nan")
    if device.type == "cuda":
        known = of_device(device_name(device))
        if known:
            return known.peak_flops(dtype == torch.bfloat16)
    return measured_flops(device, dtype)


def measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Return the best FLOP/s of several products of square matrices; takes about `MEASURED_S` seconds."""
    a, b = (torch.randn(MEASURED_SIZE, MEASURED_SIZE, device=device, dtype=torch.float32).to(dtype) for _ in range(2))
    _product_s(a, b)  # the first product also sets up the library
    best = _product_s(a, b)
    end = time.perf_counter() + MEASURED_S
    while time.perf_counter() < end:
        best = min(best, _product_s(a, b))
    return 2 * MEASURED_SIZE**3 / best


def bf16_slowdown() -> float:
    """Return how many times as long the CPU takes for a matrix product in bf16 as in fp32.

    It is well above 1 on a CPU without bf16 instructions. Takes less than 0.1 s. Measures the CPU time of one thread,
    because other programs on the same cores would hide the difference in wall-clock time or with several threads.
    """
    single = torch.randn(128, 128)
    cases = {torch.float32: single, torch.bfloat16: single.to(torch.bfloat16)}
    best = dict.fromkeys(cases, float("inf"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(5):
            for dtype, matrix in cases.items():
                start = time.thread_time()
                matrix @ matrix
                best[dtype] = min(best[dtype], time.thread_time() - start)
    finally:
        torch.set_num_threads(threads)
    return best[torch.bfloat16] / best[torch.float32]


def _product_s(a: Tensor, b: Tensor) -> float:
    start = time.perf_counter()
    (a @ b)[0, 0].item()  # waits for the device
    return time.perf_counter() - start
