"""Stores of edges return what was put in, in reverse order; edges on disk take no memory."""

from __future__ import annotations

import os
import tempfile

import pytest
import torch

from bst_dist.activation.edges import EdgeFileError, EdgesOnDisk, edges_in
from bst_dist.faults.status import UNREADABLE
from bst_dist.parallel.sequence.past import State

PLACES = ("device", "host", "disk")


def edge(seed: int) -> State:
    """Return an edge: complex states, keys in bf16, document numbers, and an empty tensor."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "state": torch.randn(2, 3, dtype=torch.complex64, generator=generator),
        "conjugate": torch.randn(2, 3, dtype=torch.complex128, generator=generator).conj(),
        "kv": torch.randn(2, 4, 5, generator=generator).transpose(1, 2).bfloat16(),
        "documents": torch.randint(9, (2, 4), generator=generator),
        "none": torch.empty(2, 0, 5),
    }


@pytest.mark.parametrize("place", PLACES)
def test_edges_are_popped_unchanged_in_reverse_order(place):
    """Also when edges are pushed again after some were popped, as from one micro-batch to the next."""
    edges, expected = edges_in(place), []
    for seed, pops in enumerate((0, 0, 1, 0, 0, 2, 0, 3)):
        edges.push(edge(seed))
        expected.append(edge(seed))
        for _ in range(pops):
            found, wanted = edges.pop(), expected.pop()
            assert list(found) == list(wanted)
            for name, value in wanted.items():
                assert found[name].dtype == value.dtype
                assert torch.equal(found[name], value)


def test_edges_on_disk_use_one_unnamed_file_that_is_reused(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    edges = EdgesOnDisk()
    for seed in range(8):
        edges.push(edge(seed))
    one = sum(value.nbytes for value in edge(0).values())
    assert edges.bytes == 8 * one
    for _ in range(8):
        edges.pop()
    assert edges.bytes == 0  # the file is reused from its beginning
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_reported_with_the_remedy(monkeypatch):
    edges = EdgesOnDisk()

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    edges.push(edge(0))
    with pytest.raises(EdgeFileError, match=r"(?s)No space left on device.*set TMPDIR") as raised:
        edges.pop()
    assert raised.value.exit_status == UNREADABLE  # a restart may find space
