"""Changes of the sequence length within a run give the same run without a stop, with stops, and on other ranks."""

from __future__ import annotations

import json
import os
import signal
from typing import Any

import pytest

from bst_base.json_lines import read_lines
from bst_base.settings import ConfigError, overridden, parse
from bst_dist.checkpoint.directory import committed, directory, read_manifest
from bst_dist.cli import main
from bst_dist.config import Recipe, load_recipe
from bst_dist.report.metrics import FILE
from bst_dist.train.run import train
from bst_dist.train.start.request import Request
from bst_dist.train.step import Trainer

CHANGES = [{"step": 3, "sequence_length": 64}, {"step": 6, "sequence_length": 16}]


def losses(run) -> list[float]:
    return [line["loss_nats"] for line in read_lines(run / FILE) if line["kind"] == "train"]


@pytest.mark.ranks
@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("documents", ["joined", "masked"])
def test_length_changes_are_equal_for_any_stops_and_ranks(recipe_file, tmp_path, on_ranks, capfd, documents):
    data = {"documents": documents}
    recipe = recipe_file(train={"steps": 8, "length_changes": CHANGES, "sequence_length": 32}, data=data)

    def go(name: str, world: int, until: int, *more: str) -> None:
        request = Request(recipe, more, tmp_path / name, True, until)
        on_ranks(world, lambda ranks: train(request, ranks))

    go("whole", 1, 8)
    said = capfd.readouterr().out
    assert "length 64 tokens from step 3, 16 tokens from step 6; evaluated with 16" in said
    for until in (2, 3, 4, 8):  # before, at and after a change; bitwise equal
        go("stops", 1, until)
    assert losses(tmp_path / "stops") == losses(tmp_path / "whole")
    for world, until, *more in [(2, 2), (4, 5, "parallel.sp=2"), (1, 7, "train.slice_tokens=16"), (2, 8)]:
        go("hops", world, until, *more)
    assert losses(tmp_path / "hops") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    assert "\nchange" not in capfd.readouterr().out
    state = read_manifest(directory(tmp_path / "hops", 7))["data"]
    assert (state["length"], state["lengths"]) == (32, [[0, 32], [3, 64], [6, 16]])
    counted = load_recipe(tmp_path / "whole/recipe.yaml").train
    assert counted.tokens == 4 * (3 * 32 + 3 * 64 + 2 * 16)
    if documents == "joined":
        assert [line["tokens"] for line in read_lines(tmp_path / "whole" / FILE) if line["kind"] == "train"][-1] in (
            range(counted.tokens - 64, counted.tokens + 1)  # a pass may end in between, padded
        )


@pytest.mark.ranks
@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("kept", [2, 6], ids=["as the length changes", "after it has changed"])
def test_a_run_killed_after_an_unsaved_step_resumes_bitwise_equal(
    recipe_file, train_in, assert_same_run, tmp_path, monkeypatch, kept
):
    lengths = {"steps": 8, "length_changes": CHANGES, "sequence_length": 32}
    go = train_in(recipe_file(train=lengths, checkpoint={"every": 2, "background": False}))
    original = Trainer.step

    def killed(self: Trainer, step: int, *rest: Any) -> Any:
        if step == kept + 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, step, *rest)

    with monkeypatch.context() as patch, pytest.raises(AssertionError, match="died"):
        patch.setattr(Trainer, "step", killed)
        go("killed", world=2)
    assert committed(tmp_path / "killed")[0] == directory(tmp_path / "killed", kept)
    go("killed", world=2, resume=True)
    go("whole", world=2)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


@pytest.mark.ranks
@pytest.mark.usefixtures("unmeasured")
def test_streamed_rows_keep_their_carried_past_until_a_length_change(recipe_file, tmp_path, on_ranks):
    recipe = recipe_file(
        train={"steps": 6, "length_changes": CHANGES[:1], "carry": True},
        data={"mode": "streaming"},
        evaluation={"every": 0},
    )

    def go(name: str, world: int, until: int) -> None:
        on_ranks(world, lambda ranks: train(Request(recipe, [], tmp_path / name, True, until), ranks))

    go("whole", 1, 6)
    for until in (3, 4, 6):
        go("stops", 2, until)
    assert losses(tmp_path / "stops") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)


@pytest.mark.ranks
@pytest.mark.usefixtures("unmeasured")
def test_a_new_length_change_is_refused_within_a_shuffled_pass(recipe_file, tmp_path, on_ranks):
    """It is refused within a pass that is shuffled as a whole. Where it is possible, it is recorded in the ledger."""
    recipe, run = recipe_file(train={"steps": 8}), tmp_path / "run"

    def go(until: int, *changes: str) -> None:
        on_ranks(1, lambda ranks: train(Request(recipe, changes, run, True, until), ranks))

    go(3)
    with pytest.raises(BaseException, match=r"train.length_changes: at step 3 .* at a step from \d+ on"):
        go(5, "train.length_changes=[{step: 4, sequence_length: 64}]")
    go(4, "train.length_changes=[{step: 1000000, sequence_length: 64}]")  # far after the pass that is shuffled now
    (entry,) = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    assert (entry["step"], entry["action"]) == (3, "change") and "train.length_changes" in entry["cause"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            ["train.length_changes=[{step: 5, sequence_length: 64}, {step: 5, sequence_length: 16}]"],
            r"length_changes: their steps must increase, found \[5, 5\]",
        ),
        (
            ["train.length_changes=[{step: 5, sequence_length: 64}, {step: 7, sequence_length: 64}]"],
            r"length_changes: step 7: sequence_length is 64 before it too; remove this change",
        ),
        (
            ["train.length_changes=[{step: 5, sequence_length: 64}]", "train.sequence_length=64"],
            r"length_changes: step 5: sequence_length is 64 before it too.*recipe\.yaml of a run directory.*continues",
        ),
        (
            ["train.length_changes=[{step: 5, sequence_length: 60}]"],
            r"length_changes: step 5: sequence_length 60 is not a multiple of model.block x parallel.sp = 8 x 1",
        ),
        (
            ["train.length_changes=[{step: 5, sequence_length: 40}]", "train.slice_tokens=16"],
            r"train.slice_tokens 16 must be a multiple",
        ),
        (
            ["train.length_changes=[{step: 5, sequence_length: 64}]", "model.mixer=full", "model.full.longest=32"],
            r"sequence_length 64 is more than full attention is configured for: raise model.full.longest \(32\)",
        ),
        (
            [
                "data.documents=masked",
                "train.length_changes=["
                + ", ".join(f"{{step: {n}, sequence_length: {8 * n}}}" for n in (1, 2, 3))
                + "]",
            ],
            r"4 lengths with masked documents; at most 3",
        ),
    ],
)
def test_invalid_length_changes_are_refused(settings, changes, said):
    with pytest.raises(ConfigError, match=said):
        parse(Recipe, overridden(json.loads(json.dumps(settings)), changes))


def test_a_plan_uses_the_longest_length_and_names_all(recipe_file, capsys):
    recipe = recipe_file(train={"length_changes": CHANGES})
    assert main(["plan", str(recipe), "--nodes", "1", "--gpus-per-node", "1"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "32 tokens, 64 from step 3, 16 from step 6; planned as if all were 64" in said
    assert "by step 6: " in said
