from __future__ import annotations

import heapq
import json
import shlex
from pathlib import Path

import pytest
import yaml

from bst_base.errors import UserError
from bst_dist import cli
from bst_dist.config import load_recipe
from bst_dist.tools import demo as program
from bst_dist.tools.demo import RECIPE, Demo, collect, show
from bst_dist.train.rundir import OUTCOME


@pytest.fixture
def demo(tmp_path, monkeypatch, make_run):
    """A demo whose commands are recorded but not run; ``demo.leave(name, step)`` makes the run of such a command."""
    monkeypatch.chdir(tmp_path)
    template = make_run("template", steps=()) / "recipe.yaml"
    demo = Demo(load_recipe(template))
    demo.typed = []
    demo._bst = lambda *words, accept=(0,): demo.typed.append(shlex.join(map(str, words)))

    def leave(name: str, step: int) -> None:
        run_dir = make_run(f"runs/{name}", steps=(step,))
        (run_dir / OUTCOME).write_text(json.dumps({"finished": step == 4}))

    demo.leave = leave
    return demo


def train(demo) -> list[str]:
    for action in (demo.train_half, demo.resume, demo.train_twin):
        action()
    return demo.typed


def test_a_fresh_demo_stops_half_way_resumes_and_trains_a_twin(demo):
    assert train(demo) == [
        f"train {RECIPE} --until 2",
        f"train {RECIPE} --resume",
        f"train {RECIPE} checkpoint.every=0 --run-dir runs/small-uninterrupted",
    ]


def test_a_demo_stopped_before_the_half_resumes_from_its_checkpoint(demo):
    demo.leave("small", 1)
    assert train(demo)[0] == f"train {RECIPE} --until 2 --resume"


def test_a_demo_stopped_after_the_half_only_resumes(demo):
    demo.leave("small", 3)
    assert train(demo)[0] == f"train {RECIPE} --resume"


def test_finished_runs_and_their_reports_are_used_again(demo):
    demo.leave("small", 4)
    demo.leave("small-uninterrupted", 4)
    assert train(demo) == []
    demo.baselines()
    assert demo.typed == [f"baselines {demo.recipe.data.corpus} --json runs/small/reports/baselines.json"]
    demo.reports.mkdir()
    (demo.reports / "baselines.json").write_text("{}")
    demo.baselines()
    assert len(demo.typed) == 1


def test_the_two_runs_are_compared_for_bitwise_equality(demo):
    demo.compare()
    report = "runs/small/reports/compare.json"
    assert demo.typed == [f"compare runs/small runs/small-uninterrupted --equal --json {report}"]


def test_runs_of_another_recipe_are_refused(demo):
    demo.leave("small", 4)
    demo.require_same_recipe()
    path = demo.run_dir / "recipe.yaml"
    path.write_text(path.read_text().replace("weight_decay: 0.1", "weight_decay: 0.2"))
    with pytest.raises(UserError, match=r"weight_decay: 0\.2, 0\.1"):
        demo.require_same_recipe()


@pytest.mark.parametrize("equal", [True, False])
def test_the_last_screen_ranks_models_and_tells_whether_runs_are_equal(demo, equal, capsys):
    estimate = {"bits_per_byte": 2.5, "bits_per_byte_standard_error": 0.1}
    scored = {**estimate, "documents": 3, "tokens": 50, "bytes": 100}
    reports = {
        "before": {"corpora": [{**scored, "bits_per_byte": 8.0}]},
        "after": {"corpora": [scored]},
        "sample": {},
        "baselines": {**{f"order2_{key}": value for key, value in estimate.items()}, "xz9_bits_per_byte": 1.5},
        "compare": {"passed": equal, "largest_difference": {"loss_nats": 0.0, "weights": 0.0 if equal else 1e-7}},
    }
    demo.reports.mkdir(parents=True)
    for name, report in reports.items():
        (demo.reports / f"{name}.json").write_text(json.dumps(report))
    report = collect(demo)
    show(demo, report)
    out = " ".join(capsys.readouterr().out.split())
    assert report["passed"] is equal
    assert "fewest bits: xz -9 (1.50), then the trained model (2.50)" in out
    assert ("resumed run equals uninterrupted run" in out) is equal
    assert ("resumed run DIFFERS" in out and "1e-07 in the final weights" in out) is not equal
    assert "runs/small/curves.png" in out


def test_a_cpu_that_is_slow_in_bf16_trains_in_fp32(demo, capsys):
    demo.recipe = load_recipe("template/recipe.yaml", ["train.precision=bf16"])
    demo.suit(1.5)
    assert demo.overrides == []
    assert capsys.readouterr().out == ""
    demo.suit(22.4)
    assert train(demo)[0] == f"train {RECIPE} train.precision=fp32 --until 2"
    assert all("train.precision=fp32" in command for command in demo.typed)
    assert "22 times as slowly in bf16" in capsys.readouterr().out


def test_existing_runs_keep_their_precision(demo):
    demo.leave("small", 3)
    demo.suit(1.0)
    before = demo.recipe.train.precision
    demo.suit(22.4)
    demo.require_same_recipe()
    assert demo.recipe.train.precision == before
    assert read_precision(demo) == before


def read_precision(demo) -> str:
    return yaml.safe_load((demo.run_dir / "recipe.yaml").read_text())["train"]["precision"]


def test_every_demo_command_is_accepted_by_the_real_parsers(demo, monkeypatch):
    """Runs do not count as finished, so that each action runs its command."""
    monkeypatch.setattr(demo, "_finished", lambda run_dir: False)
    monkeypatch.setattr(demo, "_report", lambda name, *words: demo._bst(*words, "--json", name))
    demo.overrides = ["train.precision=fp32"]
    for _, action in demo.steps():
        action()
    names = []
    for typed in demo.typed:
        words = shlex.split(typed)
        name = next(name for name in (" ".join(words[:2]), words[0]) if name in cli.COMMANDS)
        cli.parser_of(name).parse_intermixed_args(words[len(name.split()) :])
        names.append(name)
    assert names == [
        "data prepare",
        "train",
        "train",
        "train",
        "compare",
        "baselines",
        "eval",
        "eval",
        "generate",
        "plot",
    ]


@pytest.mark.ranks
@pytest.mark.long
def test_the_demo_runs_and_a_second_demo_reuses_everything(tmp_path, monkeypatch, capfd):
    """Runs `bst demo` as a user does, with a small recipe; it fails if a command or a report has changed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    for module in sorted(Path(heapq.__file__).parent.glob("[a-d]*.py"))[:25]:
        (tmp_path / "texts" / module.name).write_text(module.read_text()[:8000])
    corpus = {
        "source": {"kind": "folder", "path": "texts", "pattern": "*"},
        "output": "corpora/stdlib",
        "tokenizer": {"vocab_size": 400},
        "workers": 1,
        "validation_fraction": 0.3,
    }
    (tmp_path / "corpus.yaml").write_text(yaml.safe_dump(corpus))
    settings = yaml.safe_load((Path(__file__).parents[2] / "launch/recipes/demo.yaml").read_text())
    settings["model"] |= {"width": 16, "heads": 2, "ffn": 32, "block": 16, "ssm": {"state": 4, "chunk": 16}}
    settings["train"] |= {"steps": 4, "sequence_length": 64, "sequences": 2, "micro_sequences": 1}
    settings |= {
        "schedule": {"warmup_steps": 1},
        "evaluation": {"every": 2, "sequences": 2},
        "checkpoint": {"every": 2},
    }
    (tmp_path / "demo.yaml").write_text(yaml.safe_dump(settings))
    monkeypatch.setattr(program, "CORPUS", "corpus.yaml")
    monkeypatch.setattr(program, "RECIPE", "demo.yaml")
    assert cli.main(["demo", "--json", "first.json"]) == 0
    assert "resumed run equals uninterrupted run" in capfd.readouterr().out
    assert json.loads(Path("first.json").read_text())["resume_largest_difference"]["weights"] == 0.0
    assert cli.main(["demo"]) == 0
    again = capfd.readouterr().out
    assert "$ bst train" not in again
    assert again.count("reused: ") >= 7
