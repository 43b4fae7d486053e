from __future__ import annotations

import random

import numpy as np
import torch

from bst_dist.checkpoint import rng

CPU = torch.device("cpu")


def draw() -> tuple[float, ...]:
    normal = random.gauss(0, 1), np.random.standard_normal(), torch.randn(()).item()
    return (*normal, random.random(), np.random.random(), torch.rand(()).item())


def test_restored_generators_continue_the_same_sequence(tmp_path):
    rng.seed_all(1, rank=0)
    draw()
    torch.save(rng.capture(CPU), tmp_path / "state.pt")
    expected = [draw(), draw()]
    rng.seed_all(2, rank=0)
    rng.restore(torch.load(tmp_path / "state.pt", weights_only=True), CPU)
    assert [draw(), draw()] == expected


def test_the_state_of_a_gpu_is_restored_on_a_cpu_without_that_of_the_device():
    rng.seed_all(1, rank=0)
    state = rng.capture(CPU) | {"device": torch.zeros(16, dtype=torch.uint8)}
    expected = draw()
    rng.restore(state, CPU)
    assert draw() == expected


def test_other_seeds_and_other_ranks_draw_other_numbers():
    def first(seed: int, rank: int) -> tuple[float, ...]:
        rng.seed_all(seed, rank)
        return draw()

    drawn = {first(seed, rank) for seed in (0, 1) for rank in (0, 1)}
    assert len(drawn) == 4
    assert first(0, 1) in drawn
