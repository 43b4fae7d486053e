"""How fast a rank's device multiplies matrices: its peak, against which a run is measured, and whether bf16 pays.

Listed accelerators have their vendor's dense figure (no structured sparsity); other accelerators are measured with one
large matrix product at start. A CPU has no figure: what it reaches depends on what else runs on its cores.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from bst_dist.plan.accelerators import of_device

SLOW_BF16 = 2.0
"""Times as long as in fp32 from which on bf16 is called slow."""


def device_name(device: torch.device) -> str:
    """What the driver calls it; `cpu` for a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Peak FLOP/s of one rank's device in matrix products of `dtype` (bfloat16 or float32); nan on a CPU."""
    if device.type == "cpu":
        return float("nan")
    if device.type == "cuda":
        known = of_device(device_name(device))
        if known:
            return 1e12 * (known.bf16_tflops if dtype == torch.bfloat16 else known.fp32_tflops)
    return measured_flops(device, dtype)


def measured_flops(device: torch.device, dtype: torch.dtype, size: int = 1024, for_s: float = 0.3) -> float:
    """The best of several products of square matrices, in FLOP/s; takes about `for_s` seconds."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.float32).to(dtype) for _ in range(2))
    _product_s(a, b)  # the first product also sets up the library
    best, end = _product_s(a, b), time.perf_counter() + for_s
    while time.perf_counter() < end:
        best = min(best, _product_s(a, b))
    return 2 * size**3 / best


def bf16_slowdown(size: int = 128, rounds: int = 5) -> float:
    """How many times as long the CPU takes for a matrix product in bf16 as in fp32; well above 1 on one without
    instructions for bf16. Takes less than 0.1 s.

    Timed on one thread, in the time that this thread has computed: other programs on the same cores, and the wait for
    threads that they hold up, would hide the difference.
    """
    single = torch.randn(size, size)
    cases = {torch.float32: single, torch.bfloat16: single.to(torch.bfloat16)}
    best, threads = dict.fromkeys(cases, float("inf")), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(rounds):
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
