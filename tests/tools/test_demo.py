from __future__ import annotations

import json

import pytest

from bst_base.errors import UserError
from bst_dist.config import load_recipe
from bst_dist.tools.demo import RECIPE, Demo, collect, show
from bst_dist.train.rundir import OUTCOME


@pytest.fixture
def demo(tmp_path, monkeypatch, make_run):
    """A demo whose commands are noted and not run; ``demo.leave(name, step)`` makes the run that one would leave."""
    monkeypatch.chdir(tmp_path)
    template = make_run("template", steps=()) / "recipe.yaml"
    demo = Demo(load_recipe(template))
    demo.typed = []
    demo._bst = lambda *words, accept=(0,): demo.typed.append(" ".join(map(str, words)))

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


def test_a_demo_broken_off_before_the_half_goes_on_from_its_checkpoint(demo):
    demo.leave("small", 1)
    assert train(demo)[0] == f"train {RECIPE} --until 2 --resume"


def test_a_demo_broken_off_after_the_half_only_resumes(demo):
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


def test_the_twins_are_held_to_the_last_bit(demo):
    demo.compare()
    report = "runs/small/reports/compare.json"
    assert demo.typed == [f"compare runs/small runs/small-uninterrupted --equal --json {report}"]


def test_runs_of_another_recipe_are_not_taken_for_this_one(demo):
    demo.leave("small", 4)
    demo.require_same_recipe()
    path = demo.run_dir / "recipe.yaml"
    path.write_text(path.read_text().replace("weight_decay: 0.1", "weight_decay: 0.2"))
    with pytest.raises(UserError, match=r"weight_decay: 0\.2, 0\.1"):
        demo.require_same_recipe()


@pytest.mark.parametrize("equal", [True, False])
def test_the_last_screen_says_who_needs_fewest_bits_and_whether_the_runs_are_equal(demo, equal, capsys):
    estimate = {"bits_per_byte": 2.5, "bits_per_byte_standard_error": 0.1}
    scored = {**estimate, "documents": 3, "tokens": 50, "bytes": 100}
    reports = {
        "before": {"corpora": [{**scored, "bits_per_byte": 8.0}]}, "after": {"corpora": [scored]}, "sample": {},
        "baselines": {**{f"order2_{key}": value for key, value in estimate.items()}, "xz9_bits_per_byte": 1.5},
        "compare": {"passed": equal, "largest_difference": {"loss_nats": 0.0, "weights": 0.0 if equal else 1e-7}},
    }  # fmt: skip
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
