"""What may change when a run goes on, what may not, and the way that is left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bst_base.settings import overridden, parse
from bst_dist.checkpoint.directory import directory, read_manifest
from bst_dist.config import Recipe, differing, digest, load_recipe
from bst_dist.faults.status import DONE, USER_ERROR
from bst_dist.report.metrics import FILE, read_lines
from bst_dist.train.continuing import OtherRunError, changes

RESUME = ("train", "run/recipe.yaml", "--resume", "--run-dir", "run", "--ranks", 1)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """With checkpoints of steps 2 and 4."""
    for step in (2, 4):
        directory(tmp_path / "run", step).mkdir(parents=True)
    return tmp_path / "run"


def pair(settings, one: str, *changed: str) -> tuple[Recipe, Recipe]:
    """The small recipe under a schedule, and the same with changes."""
    before = settings | {"schedule": {"kind": one, "warmup_steps": 0, "decay_fraction": 0.7},
                         "train": settings["train"] | {"steps": 6}}  # fmt: skip
    return parse(Recipe, before), parse(Recipe, overridden(json.loads(json.dumps(before)), changed))


def test_the_rate_may_change_and_what_does_not_change_the_numbers_too(run_dir, settings):
    before, now = pair(settings, "wsd", "optimizer.learning_rate=0.5", "data.prefetch=3", "data.on_bad_shard=skip",
                       "evaluation.sequences=9", "data.corpus=elsewhere", "name=other",
                       "train.micro_sequences=2")  # fmt: skip
    assert changes(run_dir, before, now) == ["optimizer.learning_rate: 0.001, 0.5"]


@pytest.mark.parametrize("change", ["model.width=32", "seed=9", "train.sequences=8", "data.mode=streaming",
                                    "optimizer.beta2=0.9", "train.precision=bf16"])  # fmt: skip
def test_another_run_is_refused(run_dir, settings, change):
    before, now = pair(settings, "wsd", change)
    with pytest.raises(OtherRunError, match=f"holds a run with other settings(?s:.*){change.split('=')[0]}: "):
        changes(run_dir, before, now)


def test_more_steps_while_the_rate_is_constant(run_dir, settings):
    before, now = pair(settings, "wsd", "train.steps=20")
    (run_dir / "checkpoints" / "step-00000004").rmdir()  # the decay has begun by step 4
    assert changes(run_dir, before, now) == ["train.steps: 6, 20"]


@pytest.mark.parametrize(("schedule", "fitting"), [("wsd", "(2)"), ("cosine", "(none)")])
def test_more_steps_after_the_decay_has_begun_need_a_branch(run_dir, settings, schedule, fitting):
    before, now = pair(settings, schedule, "train.steps=20")
    with pytest.raises(OtherRunError) as refused:
        changes(run_dir, before, now)
    assert f"branch.run=../run branch.step=N, from a checkpoint up to which the rates agree {fitting}" in str(
        refused.value
    )
    assert f"initial_weights.run={run_dir} initial_weights.step=N (2, 4)" in str(refused.value)


def test_fewer_steps_than_are_taken(run_dir, settings):
    before, now = pair(settings, "wsd", "train.steps=3", "schedule.decay_fraction=0")
    with pytest.raises(OtherRunError, match="step 4 was already taken"):
        changes(run_dir, before, now)


def test_a_setting_that_a_later_version_adds_makes_no_other_run(settings):
    """A recipe written down before there was the setting has the default for it."""
    now = parse(Recipe, settings)
    older = json.loads(json.dumps(settings))
    del older["schedule"]["warmup_steps"]
    with_default = parse(Recipe, settings | {"schedule": {"warmup_steps": 100}})
    assert differing(parse(Recipe, older), with_default) == []
    assert digest(parse(Recipe, older)) == digest(with_default) != digest(now)


@pytest.mark.ranks
def test_a_run_goes_on_with_more_steps_another_rate_and_its_corpus_elsewhere(bst, older):
    (older.parent / "corpus").rename(older.parent / "moved")
    done = bst(
        *RESUME,
        "train.steps=8",
        "optimizer.learning_rate=0.002",
        f"data.corpus={older.parent / 'moved'}",
        "data.prefetch=2",
    )
    assert done.returncode == DONE, done.stdout
    said = "train.steps: 6, 8; optimizer.learning_rate: 0.001, 0.002"
    assert f"change {said} (before, from here on)" in done.stdout
    entries = [json.loads(line) for line in (older / "ledger.jsonl").read_text().splitlines()]
    assert [(entry["step"], entry["action"], entry["cause"]) for entry in entries] == [(4, "change", said)]
    rates = {line["step"]: line["learning_rate"] for line in read_lines(older / FILE) if line["kind"] == "train"}
    assert (rates[4], rates[5]) == (0.001, 0.002)
    assert max(rates) == 8
    assert load_recipe(older / "recipe.yaml").train.steps == 8
    assert "model.width" in read_manifest(directory(older, 8))["settings"]


@pytest.mark.ranks
def test_another_corpus_is_refused_by_its_digest(bst, older):
    manifest = older.parent / "corpus" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"unknown": 12', '"unknown": 13'))
    done = bst(*RESUME)
    assert done.returncode == USER_ERROR, done.stdout
    assert "belongs to another order (corpus:" in done.stdout
