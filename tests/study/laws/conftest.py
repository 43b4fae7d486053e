"""Synthetic sweeps of known laws."""

from __future__ import annotations

import numpy as np
import pytest

from bst_dist.study.laws.law import Points


def _sweep(law, noise=0.0, seed=0, group="bst", sizes=(2e7, 6e7, 2e8, 6e8)):
    """Four sizes x three depths x two seeds, four branches a trunk; most of the noise belongs to the trunk."""
    generator = np.random.default_rng(seed)
    rows = []
    for size in sizes:
        for depth in (4, 8, 16):
            width = np.sqrt(size / 12 / depth)
            for draw in range(2):
                level = generator.normal(0, noise)
                for multiple in (5, 10, 20, 40):
                    exact = law.loss(size, multiple * size, width / depth)
                    loss = exact * np.exp(level + generator.normal(0, noise / 4))
                    rows.append(
                        (loss, size, multiple * size, width / depth, f"{size} {depth} {draw}", f"{size} {depth}")
                    )
    loss, n, d, aspect, run, shape = (np.array(column) for column in zip(*rows, strict=True))
    return Points(loss, n, d, aspect, run, shape, np.full(len(loss), group))


@pytest.fixture
def sweep():
    """Makes the points of a sweep from a law."""
    return _sweep
