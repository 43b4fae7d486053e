"""Products of single-precision matrices on CUDA: in TF32 in bf16 training, and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def products_in_tf32(wanted: bool) -> Iterator[None]:
    """Where wanted, CUDA makes products of single-precision matrices in TF32; else as it was told before.

    In bf16 training the only ones are those of SSMs, on what bf16 products made: TF32 has three bits more.
    """
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = wanted or before
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
