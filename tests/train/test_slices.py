"""Training in slices, as a user starts it, equals training on whole sequences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import count
from typing import Any

import pytest
import torch

from bst_base.json_lines import read_lines
from bst_base.settings import ConfigError, parse
from bst_dist.checkpoint.directory import load_weights
from bst_dist.config import Recipe, digest
from bst_dist.parallel.phases import Phases
from bst_dist.report.metrics import FILE
from bst_dist.train.run import train
from bst_dist.train.start.request import Request
from bst_dist.train.step import sum_of_batch

pytestmark = pytest.mark.usefixtures("unmeasured")
Go = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def go(recipe_file, tmp_path, on_ranks) -> Go:
    """``go(run, *overrides, world=…, until=…, resume=…)`` trains the small recipe; returns the run's reports."""
    recipe = recipe_file(train={"sequence_length": 64, "sequences": 4})

    def train_(run: str, *changes: str, world: int = 1, until: int | None = None, resume: bool = False) -> list:
        on_ranks(world, lambda ranks: train(Request(recipe, changes, tmp_path / run, resume, until), ranks))
        return [line for line in read_lines(tmp_path / run / FILE) if line["kind"] in ("train", "eval")]

    return train_


def differences(run: list[dict[str, Any]], other: list[dict[str, Any]]) -> list[Any]:
    """Return the values in which two runs differ by more than rounding in fp32."""
    assert [line["kind"] for line in run] == [line["kind"] for line in other]
    names = ("loss_nats", "bits_per_byte", "gradient_norm", "loss_by_block")
    pairs = [(a[n], b[n]) for a, b in zip(run, other, strict=True) for n in names if n in a]
    return [(a, b) for a, b in pairs if a != pytest.approx(b, rel=2e-4)]


@pytest.mark.ranks
@pytest.mark.parametrize(
    "changes",
    [
        ("train.edges=host",),
        ("data.documents=isolated", "train.edges=disk", "train.edges_every=2"),
        ("data.mode=streaming", "train.carry=true"),
        ("data.documents=masked", "data.mode=streaming", "train.carry=true"),
        ("data.documents=masked", "model.context.variant=MF", "train.edges_every=2"),
        ("model.mixer=block-recurrent", "model.block_recurrent.states=4"),
    ],
)
def test_a_run_in_slices_equals_the_run_without_slices(go, changes):
    """The same losses, norms and evaluations in every step; with documents, and with a carried past."""
    at_once = [change for change in changes if "edges" not in change]
    assert differences(go("slices", "train.slice_tokens=16", *changes), go("whole", *at_once)) == []


@pytest.mark.ranks
@pytest.mark.parametrize(("documents", "variant"), [("isolated", "SH"), ("masked", "MF")])
def test_a_run_in_slices_on_a_mesh_equals_the_run_of_one_rank(go, documents, variant):
    """Two ranks per sequence, two sequences in parallel, ZeRO-3, recomputed layers."""
    spread = ("parallel.sp=2", "deepspeed=ds_configs/zero3.json", "activation_checkpointing.policy=every-layer")
    changes = (f"data.documents={documents}", f"model.context.variant={variant}")
    slices = ("train.slice_tokens=16", "train.edges_every=3")
    assert differences(go("mesh", *slices, *changes, *spread, world=4), go("one", *changes)) == []


@pytest.mark.ranks
def test_a_sliced_run_resumes_bitwise_equal_and_may_drop_slices(go, tmp_path, assert_same_run):
    carried = ("data.mode=streaming", "data.documents=masked", "train.carry=true", "train.slice_tokens=16")
    go("whole", *carried)
    go("parts", *carried, until=3)
    go("parts", *carried, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    whole = go("other", *carried)
    go("changed", *carried, until=4)
    assert differences(go("changed", *carried[:3], resume=True), whole) == []


@pytest.mark.ranks
def test_every_slice_enters_a_watchdog_phase(recipe_file, tmp_path, on_ranks, monkeypatch):
    """The watchdog counts phases that were entered, so a step of minutes must not look like a hang."""
    entered: Counter[tuple[str, int]] = Counter()
    honest = Phases.enter

    def enter(self: Phases, name: str, step: int | None = None) -> None:
        honest(self, name, step)
        entered[self.name, self.step] += 1

    def count(ranks: Any) -> Counter:
        train(Request(recipe, ("train.slice_tokens=8",), tmp_path / "run", False, 2), ranks)
        return entered

    monkeypatch.setattr(Phases, "enter", enter)
    recipe = recipe_file()
    (found,) = on_ranks(1, count)  # four sequences of four slices
    assert (found["forward", 2], found["backward", 2]) == (4 * (3 + 4), 4 * 4)


@pytest.mark.ranks
@pytest.mark.parametrize("stage", [0, 3])
def test_a_skipped_step_in_slices_changes_no_weight(go, tmp_path, monkeypatch, stage):
    """The guard decides when the losses of all slices exist, after most slices already ran their backward pass."""
    honest, calls = sum_of_batch, count()

    def spoilt(*args: Any) -> torch.Tensor:
        third_step = 4 * 4 * 2 <= next(calls) < 4 * 4 * 3
        return honest(*args) * (torch.nan if third_step else 1)

    monkeypatch.setattr("bst_dist.train.step.sum_of_batch", spoilt)
    keep = ("guard.non_finite=skip", "checkpoint.every=1", "checkpoint.keep_last=9", "evaluation.every=0")
    lines = go("run", "train.slice_tokens=16", f"deepspeed=ds_configs/zero{stage}.json", *keep, until=4)
    assert [line["step"] for line in lines] == [1, 2, 4]
    before, held, after = (load_weights(tmp_path / "run" / "checkpoints" / f"step-{n:08d}") for n in (2, 3, 4))
    assert all(torch.equal(before[name], held[name]) for name in before)
    assert not all(torch.equal(before[name], after[name]) for name in before)
    assert all(torch.isfinite(value).all() for value in after.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"slice_tokens": 12}}, "the nearest that does is 8"),
        ({"train": {"slice_tokens": 24}}, "must be a multiple of model.block x parallel.sp = 8 x 1 and divide"),
        ({"train": {"slice_tokens": 8}, "parallel": {"sp": 2}}, "the nearest that does is 16"),
        ({"train": {"edges": "disk"}}, "train.edges disk: only slices have edges"),
        ({"train": {"edges_every": 2}}, "train.edges_every 2: only slices have edges"),
        (
            {"train": {"slice_tokens": 8, "edges_every": 4}},
            "the 4 slices of a sequence: the fewest edges are kept with 2",
        ),
        ({"train": {"slice_tokens": 8}, "model": {"mixer": "full"}}, "full attention sees all keys before a slice"),
        (
            {"train": {"slice_tokens": 8}, "model": {"mixer": "transformer-xl", "transformer_xl": {"window": 16}}},
            "make it a multiple of 16",
        ),
    ],
)
def test_unsupported_slicing_is_refused_with_the_reason(settings, changes, message):
    changed = {section: {**settings.get(section, {}), **values} for section, values in changes.items()}
    with pytest.raises(ConfigError, match=message):
        parse(Recipe, settings | changed)


def test_slice_settings_do_not_change_the_recipe_digest(settings):
    """So they may change when a run is resumed, and recipes older than these settings keep their digests."""
    sliced = settings | {"train": settings["train"] | {"slice_tokens": 8, "edges": "disk", "edges_every": 2}}
    assert digest(parse(Recipe, sliced)) == digest(parse(Recipe, settings))
