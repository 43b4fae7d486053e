"""Mistakes of a user: one clear message, exit status 2, nothing launched, nothing written or changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bst_base.settings import dump
from bst_dist.checkpoint.directory import directory
from bst_dist.cli import main
from bst_dist.cluster import local
from bst_dist.train import rundir
from bst_dist.train.start.request import Request, load, of_run, resolve
from tests.cluster.listed_checkpoint import write_checkpoint


@pytest.fixture(autouse=True)
def nothing_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise AssertionError("launched")

    monkeypatch.setattr(local, "launch", refuse)


def tree(path: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["data.corpus=nowhere"], "nowhere: no prepared corpus there"),
        (["train.sequence_length=36"], "not a multiple of model.block x parallel.sp = 8 x 1: the nearest is 32"),
        (["model.heads=3"], "must divide width"),
        (["train.stepz=3"], "did you mean 'train.steps'?"),
        (["optimiser.learning_rate=1"], "did you mean"),
        (["deepspeed=ds_configs/zero9.json"], "ds_configs/zero9.json: no such file"),
        (["deepspeed=zero3_nvme_offload"], "checkpoints cannot store optimizer states that are on a drive"),
        (["train.carry=true"], "train.carry needs data.mode streaming"),
        (["train.steps=0"], "train.steps"),
        (["schedule.warmup_steps=7"], "schedule.warmup_steps 7 is longer than the run of 6 steps (train.steps)"),
        (["checkpoint.at=[2,9]"], "checkpoint.at 9 is after the run's last step, 6 (train.steps)"),
        (["--ranks", "8"], "8 data-parallel ranks but only 4 sequences per step"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_settings_are_refused_without_a_run_directory(recipe_file, tmp_path, capsys, given, said):
    recipe, run_dir = recipe_file(), tmp_path / "run"
    overrides = [part for part in given if "=" in part]
    options = [part for part in given if "=" not in part]
    assert main(["train", str(recipe), *overrides, "--run-dir", str(run_dir), *options]) == 2
    assert said in capsys.readouterr().err
    assert not run_dir.exists()


EXPLICIT = ["model.ssm={kernel: explicit, length: 32}", "model.context.ssm_width=8", "parallel.sp=2"]
COPYING = "data={synthetic: {task: copy, lag: 4, symbols: 8}, row_tokens: 64}"


@pytest.mark.parametrize(
    "given",
    [["data.mode=streaming", "train.carry=true"], ["train.slice_tokens=16"], [COPYING], [COPYING, "train.carry=true"]],
    ids=["carried", "slices", "evaluated in slices", "synthetic and carried"],
)
def test_a_filter_longer_than_a_rank_s_part_of_a_stream_is_refused(recipe_file, tmp_path, capsys, given):
    """Without a stream the ranks exchange channels instead; a stream's last inputs cannot be kept so."""
    recipe = str(recipe_file())
    common = ["train", recipe, "--run-dir", str(tmp_path / "run"), "--ranks", "2", "--check", *EXPLICIT]
    assert main(common) == 0
    assert main([*common, *given]) == 2
    assert "so each rank would hold the stream's last inputs" in capsys.readouterr().err


def test_a_missing_recipe_is_reported(tmp_path, capsys):
    assert main(["train", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml: no such file" in capsys.readouterr().err


@pytest.fixture
def run_there(recipe_file, tmp_path) -> tuple[Path, Path]:
    """A recipe, and a run directory of it with a checkpoint."""
    recipe, run_dir = recipe_file(), tmp_path / "run"
    request = Request(recipe, [], run_dir, resume=False, until=None)
    start = resolve(load(request), request, 1)
    rundir.prepare(run_dir, start.recipe, start.completed, {"ranks": 1})
    directory(run_dir, 4).mkdir(parents=True)
    return recipe, run_dir


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ([], "already has checkpoints, up to step-00000004: continue it with --resume"),
        (
            ["model.width=32", "--resume"],
            "holds a run with other settings (there, given):\n  model.width: 16, 32",
        ),
        (["schedule.kind=cosine", "--resume"], "as a branch, branch.run=../run branch.step=N, from a checkpoint"),
        (["seed=9"], "seed: 3, 9"),
    ],
)
def test_a_used_run_directory_is_refused_and_unchanged(run_there, capsys, changes, said):
    recipe, run_dir = run_there
    before = tree(run_dir)
    assert main(["train", str(recipe), *changes, "--run-dir", str(run_dir)]) == 2
    assert said in capsys.readouterr().err
    assert tree(run_dir) == before


def test_a_deepspeed_file_with_other_rounding_is_refused_on_resume(run_there, tmp_path, capsys):
    recipe, run_dir = run_there
    changed = tmp_path / "zero3.json"
    changed.write_text('{"zero_optimization": {"stage": 3, "zero_quantized_weights": true}}')
    assert main(["train", str(recipe), f"deepspeed={changed}", "--resume", "--run-dir", str(run_dir)]) == 2
    assert "zero_optimization.zero_quantized_weights: False, True" in capsys.readouterr().err


def test_settings_that_do_not_define_the_run_may_change(run_there):
    recipe, run_dir = run_there
    changes = [
        "log.every=3",
        "checkpoint.every=1",
        "ranks=2",
        "deepspeed=ds_configs/zero3.json",
        "parallel.sp=2",
        "train.micro_sequences=2",
        "activation_checkpointing.policy=every-layer",
    ]
    request = Request(recipe, changes, run_dir, resume=True, until=None)
    assert resolve(load(request), request, 2).recipe.log.every == 3


def test_a_run_directory_can_replace_the_recipe(run_there, tmp_path, capsys):
    """A run directory can replace the recipe: it means the run's own recipe and directory.

    Overrides from the start of the run are already in that recipe.
    """
    _, run_dir = run_there
    asked = of_run(Request(run_dir, ["log.every=3"], None, resume=True, until=None))
    assert asked == Request(run_dir / "recipe.yaml", ["log.every=3"], run_dir, resume=True, until=None)
    assert resolve(load(asked), asked, 1).recipe.log.every == 3
    for words, said in (
        ([], "is a run: continue it with --resume"),
        (["--resume", "--run-dir", str(tmp_path / "other")], "leave out --run-dir"),
    ):
        assert main(["train", str(run_dir), *words]) == 2
        assert said in capsys.readouterr().err
    assert main(["train", str(tmp_path / "corpus-of-nobody"), "--resume"]) == 2
    (tmp_path / "empty").mkdir()
    assert main(["train", str(tmp_path / "empty"), "--resume"]) == 2
    assert "a directory without a run (recipe.yaml is missing)" in capsys.readouterr().err


def test_a_warm_up_longer_than_the_run_is_accepted(recipe_file, tmp_path):
    assert load(Request(recipe_file(), ["schedule.warmup_steps=100"], None, resume=False, until=None))


def test_a_check_names_the_step_of_the_newest_full_checkpoint(recipe_file, tmp_path, capsys):
    recipe, run = recipe_file(), tmp_path / "run"
    write_checkpoint(run, 2, {"weights-00000.safetensors": 1, "optimizer-00000.safetensors": 2})
    write_checkpoint(run, 4, {"weights-00000.safetensors": 1})
    new = Request(recipe, [], tmp_path / "new", resume=False, until=None)
    (run / "recipe.yaml").write_text(dump(resolve(load(new), new, world=1).recipe))
    (run / "environment.json").write_text(json.dumps({"starts": [{"from_step": 0}]}))
    assert main(["train", str(recipe), "--run-dir", str(run), "--resume", "--check"]) == 0
    assert "from step 2 to 6" in capsys.readouterr().out


def test_a_check_starts_nothing_and_writes_nothing(recipe_file, tmp_path, capsys):
    recipe, report = recipe_file(), tmp_path / "report.json"
    before = tree(tmp_path)
    words = ["train", str(recipe), "--run-dir", str(tmp_path / "run"), "--ranks", "2", "--check"]
    assert main([*words, "--json", str(report)]) == 0
    assert set(tree(tmp_path)) - set(before) == {str(report)}
    said = capsys.readouterr().out
    assert "ranks  2 (dp 2 x sp 1), ZeRO-1, fp32" in said
    assert "from step 0 to 6" in said
    assert "total  6 steps, 768 tokens" in said
    assert "masked" not in said
    assert main([*words, "--ranks", "3"]) == 0
    assert (
        "masked 1 of 3 ranks has 2 sequences, 2 of 3 ranks have 1 sequence and 1 masked: 33%" in capsys.readouterr().out
    )
    assert main([*words, "model.block=7"]) == 2


def test_a_non_empty_directory_without_a_run_is_refused(recipe_file, tmp_path, capsys):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "letters.txt").write_text("dear")
    assert main(["train", str(recipe_file()), "--run-dir", str(run_dir)]) == 2
    assert "and not empty (letters.txt)" in capsys.readouterr().err
    assert [file.name for file in run_dir.iterdir()] == ["letters.txt"]


@pytest.mark.parametrize(
    "there",
    ["checkpoints", "lease", "stacks", "slurm-4711.out", "job.err", "recipe.yaml.partial", "memory-rank-00000.pickle"],
)
def test_a_directory_with_only_scheduler_or_early_exit_files_is_accepted(recipe_file, tmp_path, there):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / there).touch() if "." in there else (run_dir / there).mkdir()
    assert main(["train", str(recipe_file()), "--run-dir", str(run_dir), "--check"]) == 0


def test_a_missing_run_directory_suggests_the_nearest_name(make_run, tmp_path, capsys):
    make_run("demo")
    for words in (["train", str(tmp_path / "demp"), "--resume"], ["train", str(tmp_path / "demp")]):
        assert main(words) == 2
        said = capsys.readouterr().err
        assert said == f"bst train: no such run directory or recipe: {tmp_path}/demp; did you mean {tmp_path}/demo?\n"
    assert main(["train", str(tmp_path / "none" / "run"), "--resume"]) == 2
    assert capsys.readouterr().err == f"bst train: no such run directory or recipe: {tmp_path}/none/run\n"
    assert main(["train", "dem", "--resume"]) == 2
    assert "no such run directory or recipe: dem; did you mean demo?" in capsys.readouterr().err
    assert main(["eval", str(tmp_path / "demp")]) == 2
    assert f"{tmp_path}/demp: no run there (recipe.yaml is missing); did you mean {tmp_path}/demo?" in (
        capsys.readouterr().err
    )
