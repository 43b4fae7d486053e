"""Arithmetic peaks: what a rank could do, against which what it does is measured.

Known accelerators have their vendor's dense figure (no structured sparsity); anything else is measured with one large
matrix product, at start, on all ranks at once.
"""

from __future__ import annotations

import time

import torch

# Dense peak in FLOP/s by a part of the device's name, the most special first: (bf16, fp32 outside tensor cores).
# Vendors' data sheets: NVIDIA H100/H200 (2023), B200 (2024), A100 (2021), L40S (2023), L4 (2023), A10 (2021);
# AMD MI300X (2023), MI250X (2021; one of its two dies, which is what torch shows as a device).
PEAKS: dict[str, tuple[float, float]] = {
    "B200": (2250e12, 75e12),
    "H200": (989e12, 67e12),
    "H100 PCIe": (756e12, 51e12),
    "H100": (989e12, 67e12),
    "A100": (312e12, 19.5e12),
    "L40S": (362e12, 91.6e12),
    "L4": (121e12, 30.3e12),
    "A10": (125e12, 31.2e12),
    "MI300X": (1307e12, 163.4e12),
    "MI250X": (191.5e12, 23.9e12),
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Peak FLOP/s of one rank's device in matrix products of `dtype` (bfloat16 or float32)."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, (bf16, fp32) in PEAKS.items():
            if part in name:
                return bf16 if dtype == torch.bfloat16 else fp32
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
