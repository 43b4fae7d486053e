"""Comparable times: all cases run in turn, for several rounds, in one process.

Machines are shared, and their speed drifts. Therefore cases are interleaved (A B C, A B C, ...), figures are medians
with their range, and ratios are taken within each round before the median.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch


@dataclass(frozen=True)
class Spread:
    """Median and range of repeated measurements."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: list[float]) -> Spread:
        return Spread(median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}–{self.high:.2f})"


def interleaved(
    cases: dict[str, Callable[[], object]], rounds: int, tick: Callable[[], None]
) -> dict[str, list[float]]:
    """Return the seconds of each case in each of `rounds` rounds, after one that is not counted.

    `tick` is called after every call.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for round_ in range(rounds + 1):
        for name, run in cases.items():
            took = seconds_of(run)
            if round_:
                seconds[name].append(took)
            tick()
    return seconds


def seconds_of(call: Callable[[], object], calls: int = 1) -> float:
    """Return the seconds per call of several calls, until the device has finished the last.

    The host queues a call while the device computes the one before, as in a training step of several micro-batches.
    """
    _synchronize()
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    _synchronize()
    return (time.perf_counter() - begin) / calls


def ratios(base: list[float], other: list[float]) -> Spread:
    """Return how many times as fast as `base` the other is (base / other, paired by round)."""
    return Spread.of([a / b for a, b in zip(base, other, strict=True)])


def matmul_flops_per_s(dtype: torch.dtype, device: torch.device) -> float:
    """Measure the FLOP/s of one square matrix product, used as the peak in "of peak"."""
    size = 2048
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    return 2 * size**3 / seconds_of(lambda: a @ b)


def device() -> torch.device:
    """Return the GPU, or the CPU if there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
