"""TF32 for products of single-precision matrices on CUDA, switched on in bf16 training only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def products_in_tf32(wanted: bool) -> Iterator[None]:
    """Inside the context, compute single-precision matrix products on CUDA in TF32 if `wanted`; else change nothing.

    In bf16 training only the SSMs have such products. Their inputs are results of bf16 products, and TF32 has three
    mantissa bits more than bf16.
    """
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = wanted or before
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
