from __future__ import annotations

import mmap

import pytest
import torch

from bst_dist.study.evaluation import memory
from bst_dist.study.evaluation.memory import PeakMemory

MIB = 2**20


def test_peak_memory_counts_only_use_after_its_creation():
    cpu = torch.device("cpu")
    before = PeakMemory(cpu).bytes()
    first = PeakMemory(cpu)
    if before is None:
        pytest.skip("the system does not tell")
    held = mmap.mmap(-1, 64 * MIB)  # not from the allocator, which may reuse memory of an earlier test
    for page in range(0, len(held), mmap.PAGESIZE):
        held[page] = 1
    held.close()
    assert first.bytes() - before == pytest.approx(64 * MIB, rel=0.2)
    assert PeakMemory(cpu).bytes() - before < 32 * MIB


def test_unavailable_peak_memory_is_not_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_CLEAR", tmp_path / "none" / "clear_refs")
    assert PeakMemory(torch.device("cpu")).bytes() is None
