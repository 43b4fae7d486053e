"""Which settings may change when a run is resumed, which may not, and what the error suggests instead."""

from __future__ import annotations

import json
import math
import shlex
import shutil
from pathlib import Path

import pytest

from bst_base.json_lines import read_lines
from bst_base.settings import ConfigError, overridden, parse
from bst_dist.checkpoint.directory import MANIFEST, directory, read_manifest
from bst_dist.config import Recipe, differing, digest, load_recipe, spread_of
from bst_dist.faults.status import DONE, USER_ERROR
from bst_dist.report.metrics import FILE
from bst_dist.train.run import train
from bst_dist.train.start.changes import OtherRunError, changes, with_batch
from bst_dist.train.start.request import Request
from data_pipeline.serve.loader import Loader, open_corpora
from data_pipeline.serve.share import Share

RESUME = ("train", "run/recipe.yaml", "--resume", "--run-dir", "run", "--ranks", 1)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run directory with checkpoints of steps 2 and 4."""
    for step in (2, 4):
        directory(tmp_path / "run", step).mkdir(parents=True)
    return tmp_path / "run"


def pair(settings, one: str, *changed: str) -> tuple[Recipe, Recipe]:
    """Return the small recipe with a schedule, and the same with changes."""
    before = settings | {
        "schedule": {"kind": one, "warmup_steps": 0, "decay_fraction": 0.7},
        "train": settings["train"] | {"steps": 6},
    }
    return parse(Recipe, before), parse(Recipe, overridden(json.loads(json.dumps(before)), changed))


def test_the_learning_rate_and_settings_without_numeric_effect_may_change(run_dir, settings):
    before, now = pair(
        settings,
        "wsd",
        "optimizer.learning_rate=0.5",
        "data.prefetch=3",
        "data.on_bad_shard=skip",
        "evaluation.sequences=9",
        "data.corpus=elsewhere",
        "name=other",
        "train.micro_sequences=2",
    )
    assert changes(run_dir, before, now) == ["optimizer.learning_rate: 0.001, 0.5"]


@pytest.mark.parametrize(
    "change",
    [
        "model.width=32",
        "seed=9",
        "train.sequence_length=64",
        "data.mode=streaming",
        "optimizer.beta2=0.9",
        "train.precision=bf16",
    ],
)
def test_a_change_of_a_fixed_setting_is_refused(run_dir, settings, change):
    before, now = pair(settings, "wsd", change)
    with pytest.raises(OtherRunError, match=f"holds a run with other settings(?s:.*){change.split('=')[0]}: "):
        changes(run_dir, before, now)


def test_a_new_sequence_length_is_refused_with_a_valid_suggestion(run_dir, settings):
    """The override that the error suggests is accepted, and gives the requested length."""
    early = "train.length_changes=[{step: 3, sequence_length: 16}]"
    for given, planned in (((), []), ((early,), [(3, 16)])):
        _, before = pair(settings, "wsd", *given)
        _, now = pair(settings, "wsd", *given, "train.sequence_length=64")
        with pytest.raises(OtherRunError) as refusal:
            changes(run_dir, before, now)
        said = shlex.split(str(refusal.value).split("from here on: ")[1].split(";")[0])
        _, now = pair(settings, "wsd", *given, *said)
        assert len(changes(run_dir, before, now)) == 1 and now.train.lengths.changes == ((0, 32), *planned, (4, 64))


def test_the_batch_size_may_change_except_in_streaming_mode(run_dir, settings):
    before, now = pair(settings, "wsd", "train.sequences=6")
    assert changes(run_dir, before, now) == ["train.sequences: 4, 6"]
    before, now = (
        recipe.model_copy(update={"data": recipe.data.model_copy(update={"mode": "streaming"})})
        for recipe in (before, now)
    )
    with pytest.raises(
        OtherRunError, match=r"sequences: 4, 6(?s:.*)each streaming row reads its own part(?s:.*)initial_weights"
    ):
        changes(run_dir, before, now)


def test_a_batch_change_is_relative_to_the_resumed_checkpoint():
    """The recipe in the run directory does not matter: a later checkpoint may be damaged or rolled back."""
    assert with_batch(["train.steps: 6, 8"], {"rows": 4}, 6) == ["train.steps: 6, 8", "train.sequences: 4, 6"]
    assert with_batch(["train.sequences: 4, 6"], {"rows": 4}, 6) == ["train.sequences: 4, 6"]
    assert with_batch([], {"rows": 6, "batches": [[0, 4], [2, 6]]}, 6) == []
    assert with_batch([], {}, 6) == []


def test_more_steps_are_accepted_while_the_rate_is_constant(run_dir, settings):
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


@pytest.mark.parametrize("schedule", ["wsd", "cosine"])
def test_replan_schedule_allows_other_steps_but_no_other_settings(run_dir, settings, schedule):
    before, now = pair(settings, schedule, "train.steps=20")
    with pytest.raises(OtherRunError, match=r"from the newest checkpoint on, add --replan-schedule\. Or: Continue in"):
        changes(run_dir, before, now)
    assert changes(run_dir, before, now, replan=True) == ["train.steps: 6, 20"]
    before, now = pair(settings, schedule, "train.steps=20", "seed=9")
    with pytest.raises(OtherRunError, match="other settings"):
        changes(run_dir, before, now, replan=True)


@pytest.mark.ranks
@pytest.mark.usefixtures("unmeasured")
def test_a_cosine_run_follows_its_new_schedule_from_the_resumed_step_on(bst, recipe_file, tmp_path):
    recipe = recipe_file(train={"steps": 4}, schedule={"kind": "cosine", "warmup_steps": 0})
    assert bst("train", recipe, "--run-dir", "run", "--ranks", 1, "--until", 3).returncode == DONE
    done = bst("train", "run", "--resume", "--ranks", 1, "train.steps=8", "--replan-schedule")
    assert done.returncode == DONE, done.stdout
    assert "change train.steps: 4, 8 (before, from here on)" in done.stdout
    rates = [line["learning_rate"] for line in read_lines(tmp_path / "run" / FILE) if line["kind"] == "train"]
    peak = load_recipe(tmp_path / "run/recipe.yaml").optimizer.learning_rate
    half = [0.5 + 0.5 * math.cos(math.pi * step / 4) for step in range(3)]
    rest = [0.5 + 0.5 * math.cos(math.pi * step / 8) for step in range(3, 8)]
    assert rates == pytest.approx([peak * share for share in half + rest])


@pytest.mark.parametrize("replan", [False, True])
def test_fewer_steps_than_already_taken_are_refused(run_dir, settings, replan):
    before, now = pair(settings, "wsd", "train.steps=3", "schedule.decay_fraction=0")
    with pytest.raises(OtherRunError, match=r"step 4 was already taken(?s:.*)rate\. Continue in another"):
        changes(run_dir, before, now, replan)


def test_a_setting_missing_in_an_older_recipe_equals_its_default(settings):
    """A recipe stored before the setting existed has its default."""
    now = parse(Recipe, settings)
    older = json.loads(json.dumps(settings))
    del older["schedule"]["warmup_steps"]
    with_default = parse(Recipe, settings | {"schedule": {"warmup_steps": 100}})
    assert differing(parse(Recipe, older), with_default) == []
    assert digest(parse(Recipe, older)) == digest(with_default) != digest(now)


@pytest.mark.ranks
def test_a_run_resumes_with_more_steps_another_rate_and_a_moved_corpus(bst, older):
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
@pytest.mark.usefixtures("unmeasured")
def test_a_run_resumes_with_another_batch_size(recipe_file, tmp_path, on_ranks, capfd):
    """Six sequences from step 4 on, on four ranks; then four again. A step's bytes of text show which rows it read."""
    recipe, run = recipe_file(train={"steps": 10}), tmp_path / "run"

    def go(world: int, until: int, *changes: str) -> None:
        on_ranks(world, lambda ranks: train(Request(recipe, changes, run, True, until), ranks))

    go(1, 4)
    manifest = directory(run, 4) / MANIFEST
    older = read_manifest(manifest.parent)  # without its digest, which an older manifest does not have either
    manifest.write_text(json.dumps(older | {"settings": older["settings"] | {"train.sequences": 4}}))  # older format
    go(4, 6, "train.sequences=6")
    assert "change train.sequences: 4, 6 (before, from here on)" in capfd.readouterr().out
    go(2, 8)
    assert "change train.sequences: 6, 4 (before, from here on)" in capfd.readouterr().out
    entries = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    assert [(entry["step"], entry["action"], entry["cause"]) for entry in entries] == [
        (4, "change", "train.sequences: 4, 6"),
        (6, "change", "train.sequences: 6, 4"),
    ]
    assert read_manifest(directory(run, 8))["data"]["batches"] == [[0, 4], [4, 6], [6, 4]]
    found, rows = bytes_of(run), rows_bytes(run)
    for step, first, count in [(1, 0, 4), (4, 12, 4), (5, 16, 6), (6, 22, 6), (7, 28, 4), (8, 32, 4)]:
        assert found[step] == pytest.approx(sum(rows[first : first + count]), rel=1e-6), step


@pytest.mark.ranks
@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("stage", [1, 3])
def test_planned_batch_changes_are_equal_for_any_stops_and_ranks(recipe_file, tmp_path, on_ranks, capfd, stage):
    """4, 6 and 3 sequences: without a stop, and with stops before and at a change, each time on other ranks."""
    changes = [{"step": 2, "sequences": 6}, {"step": 5, "sequences": 3}]
    recipe = recipe_file(train={"steps": 7, "sequence_changes": changes}, deepspeed=f"zero{stage}")

    def go(name: str, world: int, until: int) -> None:
        request = Request(recipe, ["train.micro_sequences=2"], tmp_path / name, True, until)
        on_ranks(world, lambda ranks: train(request, ranks))

    go("whole", 1, 7)
    for world, until in [(2, 3), (3, 5), (1, 7)]:
        go("hops", world, until)
    said = capfd.readouterr().out
    assert "batch  6 sequences from step 2, 3 sequences from step 5" in said and "\nchange" not in said
    rows = rows_bytes(tmp_path / "whole")
    for name in ("whole", "hops"):
        found = bytes_of(tmp_path / name)
        for step, first, count in [(1, 0, 4), (2, 4, 4), (3, 8, 6), (5, 20, 6), (6, 26, 3), (7, 29, 3)]:
            assert found[step] == pytest.approx(sum(rows[first : first + count]), rel=1e-6), (name, step)
    losses = [
        [line["loss_nats"] for line in read_lines(tmp_path / name / FILE) if line["kind"] == "train"]
        for name in ("whole", "hops")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == 7
    assert load_recipe(tmp_path / "whole/recipe.yaml").train.tokens == 32 * (2 * 4 + 3 * 6 + 2 * 3)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            ["train.sequence_changes=[{step: 5, sequences: 2}, {step: 5, sequences: 3}]"],
            r"must increase, found \[5, 5\]",
        ),
        (["train.sequence_changes=[{step: 5, sequences: 2}]", "data.mode=streaming"], "only for text in shuffled mode"),
    ],
)
def test_invalid_planned_batches_are_refused(settings, changes, said):
    with pytest.raises(ConfigError, match=said):
        pair(settings, "wsd", *changes)


def test_planned_batches_may_change_on_resume(run_dir, settings):
    before, now = pair(settings, "wsd", "train.sequence_changes=[{step: 5, sequences: 2}]")
    assert len(changes(run_dir, before, now)) == 1
    with pytest.raises(
        ConfigError, match=r"3 data-parallel ranks but only 2 sequences per step \(train.sequence_changes\)"
    ):
        spread_of(now, 3)


def bytes_of(run: Path) -> dict[int, float]:
    """Return the bytes of text of every step."""
    tokens, found = 0, {}
    for line in read_lines(run / FILE):
        if line["kind"] == "train":
            nats, tokens = line["loss_nats"] * (line["tokens"] - tokens), line["tokens"]
            found[line["step"]] = nats / line["bits_per_byte"] / math.log(2)
    return found


def rows_bytes(run: Path) -> list[int]:
    """Return the bytes of text of each of the first rows of the data order."""
    recipe = load_recipe(run / "recipe.yaml")
    corpora = open_corpora(recipe.data)
    share = Share(length=recipe.train.sequence_length, rows=1, micro_rows=1)
    served = Loader(recipe.data, corpora, share, block=recipe.model.block, seed=recipe.seed)
    lengths = corpora[0].token_bytes()
    return [int((lengths[batch.labels] * batch.loss_mask).sum()) for row in range(40) for batch in served.batches(row)]


@pytest.mark.ranks
@pytest.mark.usefixtures("unmeasured")
def test_a_run_resumes_with_an_added_corpus(recipe_file, tmp_path, on_ranks, capfd):
    """From step 4 on all rows are from the other corpus. Weights of steps already taken cannot be changed."""
    recipe, run = recipe_file(train={"steps": 10}), tmp_path / "run"
    first = load_recipe(recipe).data.corpus
    shutil.copytree(first, tmp_path / "second")

    def go(until: int, *changes: str) -> None:
        on_ranks(1, lambda ranks: train(Request(recipe, changes, run, True, until), ranks))

    def mixed(weight: int, other: int) -> str:
        one, two = f"{{corpus: {first}, weight: {weight}}}", f"{{corpus: {tmp_path / 'second'}, weight: {other}}}"
        return f"data.corpus=[{one}, {two}]"

    refused = r"UserError: the checkpoint's data position belongs to another order .*weights: \w+ then, \w+ now"
    go(4)
    change = "data.weight_changes=[{step: 4, weights: [0, 1]}]"
    with pytest.raises(AssertionError, match=refused):
        go(6, mixed(1, 1), change)
    go(6, mixed(1, 0), change)
    assert "change data.weight_changes: [], [{'step': 4, 'weights': [0.0, 1.0]}]" in capfd.readouterr().out
    read = [line["tokens_by_corpus"] for line in read_lines(run / FILE) if "tokens_by_corpus" in line]
    assert [{name for name, tokens in each.items() if tokens} for each in read] == [{"second"}, {"second"}]
    with pytest.raises(AssertionError, match=refused):
        go(8, mixed(1, 0), change.replace("step: 4", "step: 5"))


@pytest.mark.ranks
def test_a_corpus_with_another_digest_is_refused(bst, older):
    manifest = older.parent / "corpus" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"unknown": 12', '"unknown": 13'))
    done = bst(*RESUME)
    assert done.returncode == USER_ERROR, done.stdout
    assert "belongs to another order (corpus:" in done.stdout
