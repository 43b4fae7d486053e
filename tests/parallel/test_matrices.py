"""Matrices that ZeRO has cut: their owners, and the exchange of their runs to the owners and back."""

from __future__ import annotations

import pytest
import torch

from bst_dist.parallel.deepspeed_import import deepspeed
from bst_dist.parallel.matrices.exchange import MatrixExchange
from bst_dist.parallel.matrices.orthogonal import flops, orthogonalised
from bst_dist.parallel.matrices.owners import Matrix, owners
from bst_dist.parallel.ranks import Ranks


def cut(sizes: dict[int, int], work: float) -> Matrix:
    """Return a matrix whose runs have these sizes by rank, one after another."""
    runs, begin = {}, 0
    for rank, count in sizes.items():
        runs[rank] = begin, count
        begin += count
    return Matrix(runs, work)


MATRICES = [cut({0: 7}, 3.0), cut({0: 2, 1: 4}, 1.0), cut({1: 5}, 1.0), cut({1: 3, 2: 6, 3: 1}, 5.0), cut({3: 8}, 2.0)]


def test_a_split_matrix_goes_to_its_least_loaded_holder():
    assert owners(MATRICES) == [0, 1, 1, 2, 3]


def test_equal_matrices_of_all_ranks_are_distributed_evenly():
    found = owners([cut(dict.fromkeys(range(4), 10), 1.0) for _ in range(10)])
    assert sorted(map(found.count, range(4))) == [2, 2, 3, 3]


@pytest.mark.ranks
def test_split_matrices_are_gathered_and_scattered_back(on_ranks):
    def run() -> dict[str, float]:
        ranks = Ranks()
        exchange = MatrixExchange(MATRICES, ranks.rank, deepspeed.comm.all_to_all_single)
        values = [
            torch.arange(sum(count for _, count in one.runs.values())) + 100.0 * place
            for place, one in enumerate(MATRICES)
        ]
        own = {
            place: values[place][begin : begin + count]
            for place, one in enumerate(MATRICES)
            if exchange.is_cut(place) and ranks.rank in one.runs
            for begin, count in [one.runs[ranks.rank]]
        }
        ranks.phases.take()
        whole = exchange.gather(own, torch.empty(0))()
        assert {place: values.tolist() for place, values in whole.items()} == {
            place: values[place].tolist() for place in (1, 3) if exchange.owners[place] == ranks.rank
        }
        back = exchange.scatter({place: -values for place, values in whole.items()}, torch.empty(0))
        assert {place: values.tolist() for place, values in back.items()} == {
            place: (-values).tolist() for place, values in own.items()
        }
        return ranks.phases.take()[1]

    sent = on_ranks(4, run)
    # Matrix 1: rank 0 has two elements, its owner is rank 1. Matrix 3: ranks 1 and 3 have 3 and 1, its owner is rank 2.
    assert [4 * out for out in (2, 3 + 2, 3 + 1, 1)] == [sum(each.values()) for each in sent]


@pytest.mark.parametrize("shape", [(16, 16), (8, 40), (40, 8)])
def test_orthogonalising_keeps_singular_vectors_and_brings_values_near_one(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape, dtype=torch.float64)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    turned = u.T @ orthogonalised(matrix) @ v.T
    assert torch.allclose(turned, turned.diagonal().diag(), atol=1e-9)
    assert turned.diagonal().min() > 0.6
    assert turned.diagonal().max() < 1.3
    assert not orthogonalised(torch.zeros(shape)).any()


def test_orthogonalising_flops_equal_the_counted_ones():
    from torch.utils.flop_counter import FlopCounterMode

    for shape in ((8, 40), (40, 8), (16, 16)):
        with FlopCounterMode(display=False) as counter:
            orthogonalised(torch.ones(shape))
        assert counter.get_total_flops() == flops(*shape)
