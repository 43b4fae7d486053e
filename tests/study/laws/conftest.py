"""Synthetic sweeps with a known scaling law, and synthetic studies with a known gap between architectures."""

from __future__ import annotations

import numpy as np
import pytest

from bst_dist.study.laws.law import Points
from bst_dist.study.laws.observation import Observation

SIZES, DEPTHS, LENGTHS = (1e5, 2e5, 4e5), (2, 8), (5.0, 10.0, 20.0)


def _sweep(law, noise=0.0, seed=0, group="bst", sizes=(2e7, 6e7, 2e8, 6e8)):
    """Return points of 4 sizes x 3 depths x 2 seeds, four branches per trunk; most of the noise is the trunk's."""
    generator = np.random.default_rng(seed)
    rows = []
    for size in sizes:
        for depth in (4, 8, 16):
            width = np.sqrt(size / 12 / depth)
            for draw in range(2):
                level = generator.normal(0, noise)
                for multiple in (5, 10, 20, 40):
                    exact = law.loss(size, multiple * size, width, depth)
                    loss = exact * np.exp(level + generator.normal(0, noise / 4))
                    rows.append((loss, size, multiple * size, width, float(depth), f"{size} {depth} {draw}"))
    loss, n, d, width, depth, run = (np.array(column) for column in zip(*rows, strict=True))
    return Points(loss, n, d, width, depth, run, np.full(len(loss), group))


def _observation(architecture, size, depth, seed, length, loss, arm="all", parameters=None, **changes):
    n = parameters or size
    stratum = f"{arm} {size:.0f} {depth}-s{seed}"
    known = {
        "name": f"{architecture} {stratum} {length}",
        "run": f"{architecture} {stratum}",
        "stratum": stratum,
        "width": 64.0,
        "non_embedding": n,
        "tokens": size * size * length / n,
        "flops": 6 * size * size * length,
        "time_s": size * length,
    }
    return Observation(
        **known
        | {
            "architecture": architecture,
            "arm": arm,
            "seed": seed,
            "depth": float(depth),
            "parameters": n,
            "length": length,
            "loss": loss,
        }
        | changes
    )


def _study(
    seed,
    mean=0.01,
    per_depth=0.0,
    per_flops=0.0,
    noise=0.004,
    seeds=4,
    variants=("bst",),
    arm="all",
    sizes=SIZES,
    parameters=lambda name, depth, size: size,
    slope=0.0,
    late=0.0,
    held_out=(),
):
    """Return observations of the baseline and the variants.

    The gap is `mean` plus its slopes in the natural logarithms of depth and compute. `parameters` may make the models
    unequal; the loss then depends on N with `slope` at equal compute.
    """
    generator = np.random.default_rng(seed)
    found = []
    for size in (*sizes, *held_out):
        for depth in DEPTHS:
            for draw in range(seeds):
                levels = {name: generator.normal(0, noise) for name in ("sliding", *variants)}
                for length in LENGTHS:
                    flops = 6 * size * size * length
                    base = 1.0 + 20 * size**-0.3 + 20 * (size * length) ** -0.3
                    gain = mean + per_depth * np.log(depth / 4) + per_flops * np.log(flops / 2e12)
                    for name, level in levels.items():
                        n = parameters(name, depth, size)
                        rest = generator.normal(0, noise / 4) + level
                        if slope:  # a power of compute and of the exact size
                            base = 3 * (flops / 1e12) ** -0.15 * (n / 1e5) ** slope
                        loss = base * np.exp(rest - gain * (name != "sliding"))
                        places = loss * np.exp(
                            -np.array((0.0, late)) * (name != "sliding") + generator.normal(0, noise, 2)
                        )
                        found.append(
                            _observation(
                                name,
                                size,
                                depth,
                                draw,
                                length,
                                loss,
                                arm,
                                n,
                                by_block=tuple(places),
                                held_out=size in held_out,
                            )
                        )
    return found


@pytest.fixture
def sweep():
    """Function that makes the points of a sweep from a law."""
    return _sweep


@pytest.fixture
def study():
    """Function that makes the observations of a study with a known gap."""
    return _study


@pytest.fixture
def observation():
    return _observation
