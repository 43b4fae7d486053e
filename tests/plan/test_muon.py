"""Muon's cost on the busiest rank, compared with closed forms."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bst_dist.config import Recipe
from bst_dist.model.config import ModelConfig
from bst_dist.model.lm import LanguageModel
from bst_dist.plan.accelerators import accelerator
from bst_dist.plan.memory.zero import Sizes, Strategy, states
from bst_dist.plan.muon import busiest
from bst_dist.plan.search import Choice, Planner
from bst_dist.plan.speed import Cluster
from bst_dist.plan.traffic import MOMENTUM

SMALL = {"width": 64, "heads": 2, "ffn": 96, "block": 8, "depth": 2, "vocab_size": 29, "mixer": "bst"}


def test_equal_matrices_are_divided_evenly_over_ranks():
    """Each of 4 ranks owns 3 of 12 matrices, receives three quarters of them, sends as much, and then the same back."""
    found = busiest((100,) * 12, (7.0,) * 12, stage=3, world=4)
    assert (found.flops, found.updated, found.sent) == (3 * 7.0, 300, 2 * 2 * 3 * 75)


def test_rank_boundaries_split_few_matrices():
    """Three matrices of 10 elements on two ranks: the cut is in the middle of the second, which rank 0 owns."""
    found = busiest((10,) * 3, (5.0,) * 3, stage=1, world=2)
    assert (found.flops, found.updated, found.sent) == (10.0, 15, 2 * 5)
    assert busiest((10,) * 4, (5.0,) * 4, stage=1, world=2).sent == 0


@pytest.mark.parametrize("stage", range(4))
def test_muon_has_one_moment_per_matrix(stage):
    model = LanguageModel(ModelConfig(**SMALL))
    adam, muon = (Sizes.of(model, muon=muon) for muon in (False, True))
    matrices = sum(weight.numel() for weight, _ in model.hidden_matrices())
    strategy = Strategy.of({"stage": stage}, "test")
    one, other = (states(sizes, strategy, 2, accumulation=1) for sizes in (adam, muon))
    assert one.moments - other.moments == 4 * matrices // (2 if stage else 1)
    assert other.updating > one.updating
    assert replace(other, moments=one.moments, updating=one.updating) == one


def test_plan_counts_muon_communication_and_flops():
    train = {"steps": 10, "sequence_length": 64, "sequences": 8}
    settings = {"name": "small", "model": SMALL, "data": {"corpus": "none", "documents": "joined"}, "train": train}
    ways = {}
    for kind in ("adamw", "muon"):
        recipe = Recipe.model_validate(settings | {"optimizer": {"kind": kind}})
        planner = Planner(recipe, Cluster(1, 2, accelerator("h100-80gb")))
        ways[kind] = {stage: planner.candidate(Choice(stage, 1, 1, "none")) for stage in (0, 3)}
        sizes = planner.sizes
    assert all(MOMENTUM not in way.traffic and way.speed.muon == 0 for way in ways["adamw"].values())
    assert MOMENTUM not in ways["muon"][0].traffic
    assert ways["muon"][3].traffic[MOMENTUM] == pytest.approx(2 * sum(sizes.groups[0]) / 2, rel=0.02)  # bf16
    assert 0 < ways["muon"][3].speed.muon < ways["muon"][0].speed.muon
    assert ways["muon"][3].speed.exposed > ways["adamw"][3].speed.exposed  # no overlap
