"""The plan that a user gets: layouts that fit, and errors with their reasons."""

import json
import os
import shlex
import signal

import pytest
import torch

from bst_base.settings import dump, parse
from bst_dist.cli import main
from bst_dist.config import Recipe
from bst_dist.plan.accelerators import accelerator
from bst_dist.plan.figures import describe, mfu, run_hours, tokens_a_step
from bst_dist.plan.flops import train_flops_per_token
from bst_dist.plan.hardware import peak_flops
from bst_dist.plan.memory.zero import Strategy
from bst_dist.plan.search import HEADROOM, Choice, PlanError, Planner
from bst_dist.plan.speed import Cluster
from bst_dist.report.utilisation import Utilisation

SETTINGS = {
    "name": "small",
    "model": {
        "width": 64,
        "heads": 4,
        "ffn": 256,
        "block": 32,
        "depth": 4,
        "vocab_size": 100,
        "mixer": "bst",
        "placement": [1, 3],
        "ssm": {"state": 8, "chunk": 16},
    },
    "data": {"corpus": "none"},
    "train": {"steps": 100, "sequence_length": 256, "sequences": 16},
}


def device(memory_gb: float):
    return accelerator("h100-80gb").model_copy(update={"memory_gb": memory_gb})


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(dump(parse(Recipe, SETTINGS)))
    return str(path)


def test_plan_with_enough_memory_uses_no_recomputation_or_sequence_parallelism():
    best = Planner(parse(Recipe, SETTINGS), Cluster(1, 4, device(80))).best()
    assert (best.work.checkpointing.policy, best.work.slice.sp, best.fits) == ("none", 1, True)
    assert best.work.slice.rows * best.work.accumulation * 4 == 16


@pytest.mark.parametrize(
    ("strategy", "setting"), [("zero3_hierarchical", "zero_hpz_partition_size"), ("zero3_cpu_offload", "offload")]
)
def test_strategies_that_are_not_modelled_are_refused(recipe_file, capsys, strategy, setting):
    assert main(["plan", recipe_file, f"deepspeed={strategy}"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"{strategy}: bst plan does not cover" in said
    assert setting in said


def test_hierarchical_partitions_of_one_rank_are_plain_zero3():
    """DeepSpeed's default, 1, is no second partition."""
    assert Strategy.of({"stage": 3, "zero_hpz_partition_size": 1}, "own") == Strategy.of({"stage": 3}, "own")


def test_plan_with_less_memory_is_slower_and_fits(monkeypatch):
    monkeypatch.setattr("bst_dist.plan.search.RESERVED_BYTES", 0)
    planner = Planner(parse(Recipe, SETTINGS), Cluster(1, 1, device(80)))
    roomy, tight = (planner.candidate(Choice(0, 1, 1, policy)) for policy in ("none", "every-layer"))
    between = (roomy.needed + tight.needed) / 2 / (1 - HEADROOM) / 1e9
    best = Planner(planner.recipe, Cluster(1, 1, device(between))).best()
    assert best.fits
    assert best.work.checkpointing.policy != "none"
    assert best.speed.total > planner.best().speed.total  # with all the memory


def test_more_ranks_than_sequences_use_sequence_parallelism():
    best = Planner(parse(Recipe, SETTINGS), Cluster(4, 8, device(80))).best()
    assert best.work.slice.sp == 2
    assert sum(best.between.values()) > 0


def test_uneven_ranks_compute_masked_sequences(recipe_file, capsys, tmp_path):
    planner = Planner(parse(Recipe, SETTINGS), Cluster(1, 3, device(80)))
    best = planner.best()
    rows = best.work.slice.rows * best.work.accumulation  # the 16 rows are spread as 6, 5 and 5
    assert rows == 6
    assert best.spread.masked == 3 * rows - 16
    assert tokens_a_step(best) == 16 * 256
    alone = Planner(parse(Recipe, SETTINGS), Cluster(1, 1, device(80)))
    one = alone.candidate(Choice(0, 1, 1, "none"))
    three = planner.candidate(Choice(0, 1, 1, "none"))
    assert three.speed.flops / one.speed.flops == pytest.approx(18 / 16)  # of all ranks, the masked rows included
    used = mfu(three, planner.cluster, True) * three.speed.total * 3, mfu(one, alone.cluster, True) * one.speed.total
    assert used[0] == pytest.approx(used[1])
    assert main(["plan", recipe_file, "--gpus-per-node", "3"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "1 of 3 ranks has 6 sequences, 2 of 3 ranks have 5 sequences and 1 masked: 11% of the computation" in said


@pytest.mark.parametrize(("precision", "peak"), [("bf16", 989e12), ("fp32", 67e12)])
def test_planned_mfu_equals_the_trainers_of_a_step_that_takes_as_long(precision, peak, monkeypatch):
    """The peaks are those of the H100's data sheet."""
    monkeypatch.setattr("bst_dist.plan.hardware.device_name", lambda _: "NVIDIA H100 80GB HBM3")
    recipe = parse(Recipe, SETTINGS | {"train": SETTINGS["train"] | {"precision": precision}})
    planner = Planner(recipe, Cluster(1, 1, device(80)))
    best = planner.candidate(Choice(0, 1, 4, "none"))
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    assert peak_flops(torch.device("cuda"), dtype) == peak
    trainer = Utilisation(train_flops_per_token(recipe.model, 256), peak)
    tokens_per_s = 16 * 256 / best.speed.total
    assert mfu(best, planner.cluster, planner.bf16) == pytest.approx(trainer.mfu(tokens_per_s))
    assert describe(planner, best)["mfu"] == pytest.approx(trainer.mfu(tokens_per_s))


CHANGING = SETTINGS | {
    "data": {"corpus": "none", "mode": "shuffled"},
    "train": SETTINGS["train"]
    | {
        "sequence_changes": [
            {"step": 30, "sequences": 64},
            {"step": 40, "sequences": 24},
            {"step": 100, "sequences": 4096},
        ]
    },
}
"""16, 64 and 24 sequences per step; the last change is after the last step."""


def planner_for(sequences: int) -> Planner:
    """Return a planner of the same run with one batch."""
    train = SETTINGS["train"] | {"sequences": sequences}
    return Planner(parse(Recipe, SETTINGS | {"train": train}), Cluster(1, 4, device(80)))


def test_hours_of_a_changing_batch_are_the_weighted_sum_of_plans_with_one_batch():
    planner = Planner(parse(Recipe, CHANGING), Cluster(1, 4, device(80)))
    alone = {
        16: planner_for(16).candidate(Choice(2, 1, 4, "none")),
        64: planner_for(64).candidate(Choice(2, 1, 4, "none")),
        24: planner_for(24).candidate(Choice(2, 1, 3, "none")),
    }
    seconds = {count: way.speed.total for count, way in alone.items()}
    way = planner.candidate(Choice(2, 1, 4, "none"))
    assert run_hours(planner, way) * 3600 == pytest.approx(30 * seconds[16] + 10 * seconds[64] + 60 * seconds[24])
    assert seconds[64] > 1.5 * seconds[16]
    assert way.needed == max(one.needed for one in alone.values()) > alone[16].needed
    assert planner.best() == planner_for(64).best()


def test_ranks_of_a_changing_batch_are_limited_by_the_smallest():
    assert Planner(parse(Recipe, CHANGING), Cluster(4, 8, device(80))).degrees()[0] == 2  # 32 ranks, 16 sequences
    changes = [{"step": 30, "sequences": 2}]
    few = CHANGING | {"train": CHANGING["train"] | {"sequence_changes": changes}}
    with pytest.raises(PlanError, match=r"only 16 blocks of 32 tokens \(train.sequence_changes 2 x"):
        Planner(parse(Recipe, few), Cluster(3, 8, device(80))).degrees()


def test_plan_command_says_what_holds_for_which_batch(tmp_path, capsys):
    path, report = tmp_path / "changing.yaml", tmp_path / "plan.json"
    path.write_text(dump(parse(Recipe, SETTINGS | {"data": CHANGING["data"]})))
    setting = "train.sequence_changes=[{step: 30, sequences: 64}]"
    assert main(["plan", str(path), setting, "--gpus-per-node", "4", "--json", str(report)]) == 0
    printed = capsys.readouterr().out
    assert "everything else is for the largest batch of 64" in " ".join(printed.split())
    plan = json.loads(report.read_text())
    assert [tuple(one.values())[:3] for one in plan["batches"]] == [(0, 30, 16), (30, 70, 64)]
    assert plan["gpu_hours"] == pytest.approx(4 / 3600 * sum(one["steps"] * one["step_s"] for one in plan["batches"]))
    command = next(line for line in printed.splitlines() if line.startswith("bst train"))
    assert setting in shlex.split(command)  # quoted for a shell
    assert main(["plan", str(path), setting, "--gpus-per-node", "4", "--lengths", "512", "--json", str(report)]) == 0
    plan = json.loads(report.read_text())["plans"][0]
    assert [one["sequences"] for one in plan["batches"]] == [8, 32]  # as many tokens per step as before


def test_plan_command_prints_valid_training_options(recipe_file, capsys, tmp_path):
    assert main(["plan", recipe_file, "--gpus-per-node", "2", "--json", str(tmp_path / "plan.json")]) == 0
    report = json.loads((tmp_path / "plan.json").read_text())
    assert report["fits"]
    assert report["host_start_bytes"] > 0
    assert " ".join(report["overrides"]) in (said := capsys.readouterr().out)
    assert "at the start" in said
    assert "sp: 1" in dump(parse(Recipe, SETTINGS | {"parallel": {"sp": report["sp"]}}))


def test_ctrl_c_prints_the_finished_lines_of_a_table(recipe_file, tmp_path, monkeypatch, capsys):
    real = Planner.best
    monkeypatch.setattr(Planner, "best", lambda self: os.kill(os.getpid(), signal.SIGINT) or real(self))
    command = ["plan", recipe_file, "--nodes", "1,2", "--json", str(tmp_path / "plan.json"), "--gpus-per-node", "2"]
    assert main(command) == 130
    report = json.loads((tmp_path / "plan.json").read_text())
    assert [plan["nodes"] for plan in report["plans"]] == [1]
    assert "stopped: 1 of 2 are planned" in capsys.readouterr().err


def test_table_keeps_the_tokens_per_step_constant(recipe_file, tmp_path):
    command = ["plan", recipe_file, "--nodes", "1,2", "--lengths", "256,1024", "--json", str(tmp_path / "plan.json")]
    assert main([*command, "--gpus-per-node", "2"]) == 0
    plans = json.loads((tmp_path / "plan.json").read_text())["plans"]
    assert [(plan["gpus"], plan["sequence_length_tokens"]) for plan in plans] == [
        (2, 256),
        (4, 256),
        (2, 1024),
        (4, 1024),
    ]
    assert [plan["micro_sequences"] * plan["micro_batches"] * plan["dp"] for plan in plans] == [16, 16, 4, 4]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpu", "h100"], "did you mean h100-80gb?"),
        (["--nodes", "1000"], "each rank needs at least one. Use at most 128 ranks"),
        (["--gpus-per-node", "17"], "no sp divides 17 ranks"),
        (["--lengths", "100"], "nearest is 96"),
        (["--accelerators", "missing.yaml"], "missing.yaml: no such file"),
    ],
)
def test_invalid_plan_options_give_one_message(recipe_file, capsys, arguments, said):
    assert main(["plan", recipe_file, *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error


def test_users_can_define_devices(recipe_file, tmp_path, capsys):
    fields = {
        "title": "Ours",
        "memory_gb": 96,
        "bf16_tflops": 500,
        "fp32_tflops": 50,
        "memory_gbs": 2000,
        "in_node_gbs": 100,
        "between_nodes_gbs": 25,
        "source": "measured",
    }
    own = tmp_path / "own.yaml"
    own.write_text(json.dumps({"ours": fields}))
    assert main(["plan", recipe_file, "--gpu", "ours", "--accelerators", str(own)]) == 0
    assert "Ours" in capsys.readouterr().out
    own.write_text(json.dumps({"ours": fields | {"memory_gb": -1}}))
    assert main(["plan", recipe_file, "--gpu", "ours", "--accelerators", str(own)]) == 2
    assert "memory_gb" in capsys.readouterr().err
