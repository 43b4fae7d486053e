"""Calibration with the measured step times of a run: `bst plan --from-run`."""

import json

import pytest

from bst_base.settings import dump, parse
from bst_dist.cli import main
from bst_dist.config import Recipe
from bst_dist.plan.accelerators import accelerator
from bst_dist.plan.measured import FEWEST_STEPS, measure
from bst_dist.plan.search import Planner
from bst_dist.plan.speed import Cluster
from bst_dist.report.warm_up import WARM_UP_STEPS

SETTINGS = {
    "name": "small",
    "model": {
        "width": 64,
        "heads": 4,
        "ffn": 256,
        "block": 32,
        "depth": 2,
        "vocab_size": 100,
        "mixer": "bst",
        "placement": [1],
        "ssm": {"state": 8, "chunk": 16},
    },
    "data": {"corpus": "none"},
    "train": {"steps": 100, "sequence_length": 256, "sequences": 16},
}
H100 = accelerator("h100-80gb")


@pytest.fixture
def run(tmp_path):
    """Makes a run directory; each start is (from_step, ranks, hosts, step times in seconds)."""

    def make(*starts, device="NVIDIA H100 80GB HBM3", **settings):
        directory = tmp_path / "first"
        directory.mkdir()
        (directory / "recipe.yaml").write_text(dump(parse(Recipe, SETTINGS | settings)))
        entries, lines = [], []
        for begin, ranks, hosts, seconds in starts:
            entries.append({"from_step": begin, "ranks": ranks, "hosts": [f"node-{n}" for n in range(hosts)]})
            entries[-1] |= {"device": device} if device else {}
            lines += [{"kind": "train", "step": begin + n + 1, "step_time_s": s} for n, s in enumerate(seconds)]
        (directory / "environment.json").write_text(json.dumps({"starts": entries}))
        (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return directory

    return make


def planned_s(nodes: int, per_node: int) -> float:
    return Planner(parse(Recipe, SETTINGS), Cluster(nodes, per_node, H100)).as_written().speed.total


def test_calibration_factor_is_median_step_time_over_planned_time(run):
    seconds = [60.0, 30.0, *(1 + n / 10 for n in range(11))]  # two warm-up steps, then a median of 1.5
    measured = measure(run((0, 8, 2, seconds)), H100)
    assert (measured.cluster.nodes, measured.cluster.per_node, measured.steps) == (2, 4, 11)
    assert measured.seconds == pytest.approx((1.5, 1.1, 1.9))
    assert measured.slower == pytest.approx(1.5 / planned_s(2, 4))


def test_latest_start_with_enough_steps_is_used(run):
    enough = WARM_UP_STEPS + FEWEST_STEPS
    measured = measure(run((0, 2, 1, 20 * [9.0]), (20, 4, 1, enough * [2.0]), (20 + enough, 8, 1, 3 * [5.0])), H100)
    assert (measured.cluster.world, measured.seconds[0], measured.steps) == (4, 2.0, FEWEST_STEPS)


def test_steps_after_a_batch_change_are_left_out(run):
    train = SETTINGS["train"] | {"sequence_changes": [{"step": 20, "sequences": 32}]}
    measured = measure(run((0, 1, 1, 20 * [1.0] + 50 * [2.0]), train=train), H100)
    assert (measured.seconds[0], measured.steps) == (1.0, 18)


def test_a_run_that_was_never_started_is_refused(run, capsys):
    made = run()
    (made / "environment.json").unlink()
    gpus = ["--gpu", "h100-80gb", "--gpus-per-node", "1"]
    assert main(["plan", str(made / "recipe.yaml"), *gpus, "--from-run", str(made)]) == 2
    assert f"{made}: was never started (environment.json is missing)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "device, gpu, refused",
    [("cpu", "h100-80gb", "ran on cpu, not on NVIDIA H100"), (None, "h100-80gb", None), ("cpu", "own", None)],
)
def test_run_on_another_known_device_is_refused(run, device, gpu, refused, capsys):
    made = run((0, 1, 1, 20 * [1.0]), device=device)
    own = made.parent / "own.yaml"
    fields = [f"{key}: {value}" for key, value in H100.model_dump().items() if key not in ("device", "title", "source")]
    own.write_text("own:\n  " + "\n  ".join(["title: ours", "source: measured", *fields]))
    options = ["--gpu", gpu, "--accelerators", str(own), "--gpus-per-node", "1", "--from-run", str(made)]
    status = main(["plan", str(made / "recipe.yaml"), *options])
    assert status == (2 if refused else 0)
    assert not refused or refused in capsys.readouterr().err


def test_a_run_of_few_steps_is_refused(run):
    with pytest.raises(Exception, match="no start took 10 steps after its first 2"):
        measure(run((0, 1, 1, 11 * [1.0])), H100)


def test_calibrated_plan_of_a_run_equals_its_measured_time(run, capsys, tmp_path):
    made, report = run((0, 1, 1, 20 * [3.5])), tmp_path / "plan.json"
    way = Planner(parse(Recipe, SETTINGS), Cluster(1, 1, H100)).as_written()
    asked = ["plan", str(made / "recipe.yaml"), "--gpus-per-node", "1", "--json", str(report)]
    main(asked)
    plain = json.loads(report.read_text())
    main([*asked, "--from-run", str(made)])
    assert "3.5 s per step on 1 rank (median of 18 steps; 10 to 90 %: 3.5 to 3.5)" in capsys.readouterr().out
    found = json.loads(report.read_text())
    assert found["overrides"] == plain["overrides"]
    assert found["step_s"]["total"] == pytest.approx(plain["step_s"]["total"] * 3.5 / way.speed.total)
    assert found["mfu"] == pytest.approx(plain["mfu"] * way.speed.total / 3.5)
