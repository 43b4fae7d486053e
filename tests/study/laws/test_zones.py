"""The advantage by part of the sequence, on pairs whose gap in each part is known exactly."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from bst_dist.study.laws.advantage import compare
from bst_dist.study.laws.zones import zones

BLOCKS = 32
WITHIN, BEYOND = 0.01, 0.03
PER_DOUBLING = -0.01


def with_places(observed, blocks=BLOCKS, noise=0.0):
    """Return the same runs with losses by block.

    A variant gains 0 in the first window, WITHIN inside the reach of its depth, and outside of it BEYOND at four
    layers, which changes by PER_DOUBLING per doubling of the depth.
    """
    generator, found = np.random.default_rng(0), []
    for o in observed:
        place = np.arange(blocks)
        beyond = BEYOND + PER_DOUBLING * np.log2(o.depth / 4)
        gain = np.where(place == 0, 0.0, np.where(place < o.depth, WITHIN, beyond))
        losses = 3.0 * np.exp(-gain * (o.architecture != "sliding") + generator.normal(0, noise, blocks))
        found.append(replace(o, by_block=tuple(losses)))
    return found


def test_each_zone_has_its_own_advantage_and_change(study):
    found = zones(with_places(study(1, noise=0.001)), "sliding", "all", [])["bst"]
    first, within, beyond = found
    assert [z.zone for z in found] == ["first window", "within reach", "beyond reach"]
    assert first.mean.value == pytest.approx(0, abs=1e-12)
    assert within.mean.value == pytest.approx(WITHIN)
    assert beyond.mean.value == pytest.approx(BEYOND)  # the mean of depths 2 and 8 is 4, in logarithms
    assert within.change.value == pytest.approx(0, abs=1e-9)
    assert beyond.change.value == pytest.approx(PER_DOUBLING)
    assert {z.pairs for z in found} == {24}


def test_zone_verdicts_are_given_only_in_the_verdict_arm(study):
    observed = with_places(study(1, arm="far"), noise=0.002) + with_places(study(2, arm="other"), noise=0.002)
    found = zones(observed, "sliding", "far", ["other"])["bst"]
    answers = {(z.arm, z.zone): z.answer for z in found}
    assert answers["far", "beyond reach"] == "shrinks"
    assert answers["far", "within reach"] == "equivalent"
    assert {answer for (arm, _), answer in answers.items() if arm == "other"} == {None}


def test_sequences_within_reach_have_no_zones(study):
    """Two layers see both blocks of a sequence, so nothing is beyond the reach."""
    assert zones(with_places(study(1), blocks=2), "sliding", "all", []) == {}
    bare = [replace(o, by_block=()) for o in study(1)]
    assert zones(bare, "sliding", "all", []) == {}


def test_comparison_contains_the_zones_of_every_arm(study):
    observed = study(1, arm="near") + with_places(study(2, arm="far"), noise=0.001)
    found = compare(observed, "sliding", "near").variants["bst"].zones
    assert {(z.arm, z.zone) for z in found} == {("far", z) for z in ("first window", "within reach", "beyond reach")}
    assert compare(observed, "sliding", "near", "time_s").variants["bst"].zones == []


def test_blocks_without_labels_do_not_count(study):
    """Validation documents shorter than the sequence leave its last blocks without labels, in every run alike."""
    full = with_places(study(1, noise=0.001))
    cut = {n: [replace(o, by_block=(*o.by_block[:n], *[np.nan] * (BLOCKS - n))) for o in full] for n in (20, 2)}
    beyond = zones(cut[20], "sliding", "all", [])["bst"][-1]
    assert (beyond.zone, beyond.pairs) == ("beyond reach", 24)
    assert beyond.mean.value == pytest.approx(BEYOND)
    found = {zone.zone: zone.pairs for zone in zones(cut[2], "sliding", "all", [])["bst"]}
    assert found == {"first window": 24, "within reach": 24}  # two layers reach both blocks, and nothing is beyond
