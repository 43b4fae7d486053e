"""A run can continue under another layout: its state is bitwise equal, its losses equal up to rounding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bst_base.json_lines import read_lines
from bst_dist.checkpoint.directory import OPTIMIZER, directory, load_weights, open_shards, stored_name
from bst_dist.checkpoint.fragments import MOMENTS
from bst_dist.checkpoint.snapshot import Position, Snapshots
from bst_dist.report.metrics import FILE
from bst_dist.train.run import train
from bst_dist.train.start.request import Request

pytestmark = [pytest.mark.ranks, pytest.mark.usefixtures("unmeasured")]
Go = Callable[..., None]

# Ranks, sp and ZeRO stage of consecutive starts: every stage is left and entered, with one rank and with several.
# Three ranks do not divide the eight sequences.
HOPS = [(1, 1, 0), (2, 2, 1), (4, 2, 3), (3, 1, 2), (1, 1, 3), (2, 2, 0), (4, 4, 2), (1, 1, 1)]


@pytest.fixture
def go(recipe_file, tmp_path, on_ranks) -> Go:
    """``go(run, layout, until, *overrides)`` starts or resumes the small recipe in the directory `run`."""
    recipe = recipe_file(
        train={"steps": len(HOPS), "sequences": 8}, checkpoint={"every": 0, "keep_last": 20}, evaluation={"every": 0}
    )

    def train_(run: str, layout: tuple[int, int, int], until: int, *changes: str) -> None:
        world, sp, stage = layout
        overrides = [f"parallel.sp={sp}", f"deepspeed=ds_configs/zero{stage}.json", *changes]
        on_ranks(world, lambda ranks: train(Request(recipe, overrides, tmp_path / run, True, until), ranks))

    return train_


def state_of(engine: Any) -> dict[str, Tensor]:
    """Return weights and moments by name, gathered by DeepSpeed's own functions."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    zero, found = engine.optimizer, {}
    if engine.zero_optimization_stage() in (1, 2):
        zero._lazy_init_hp_params_optimizer_state()
    for name, parameter in engine.module.named_parameters():
        for moment in MOMENTS:
            if engine.zero_optimization_stage() == 0:
                found[stored_name(name, moment)] = zero.state[parameter][moment]
            else:
                found[stored_name(name, moment)] = safe_get_full_optimizer_state(parameter, moment)
        found[name] = safe_get_full_fp32_param(parameter) if engine.zero_optimization_stage() else parameter.detach()
    return found


def adam_steps(engine: Any) -> set[int]:
    zero = engine.optimizer
    states = (zero if engine.zero_optimization_stage() == 0 else zero.optimizer).state.values()
    return {int(state["step"]) for state in states}


def losses(run: Path) -> Tensor:
    return torch.tensor([line["loss_nats"] for line in read_lines(run / FILE) if line["kind"] == "train"])


@pytest.fixture
def loads_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """After every load, compare the engine's state with the checkpoint."""
    original = Snapshots.load

    def load(self: Snapshots, checkpoint: Path, recipe: str | None = None) -> Position:
        position = original(self, checkpoint, recipe)
        engine = self.state.engine
        moments = open_shards(checkpoint, OPTIMIZER)
        stored = {**load_weights(checkpoint), **moments.all_of(moments.shapes)}
        found = state_of(engine)
        assert found.keys() == stored.keys()
        for name, tensor in found.items():
            assert torch.equal(tensor.view(-1), stored[name].view(-1)), name
        assert all(stored[name].any() for name in stored if name.startswith("exp_avg_sq"))
        assert adam_steps(engine) == {position.step}
        assert [group["weight_decay"] for group in engine.optimizer.param_groups] == [0.1, 0.0, 0.0]
        return position

    monkeypatch.setattr(Snapshots, "load", load)


def test_a_run_resumes_under_any_layout(go, tmp_path, loads_are_exact, capfd):
    go("whole", (1, 1, 1), len(HOPS))
    for done, layout in enumerate(HOPS):
        go("hops", layout, done + 1)
    assert torch.allclose(losses(tmp_path / "hops"), losses(tmp_path / "whole"), rtol=2e-6)
    whole, hops = (load_weights(directory(tmp_path / run, len(HOPS))) for run in ("whole", "hops"))
    for name, tensor in whole.items():
        assert torch.allclose(tensor, hops[name], rtol=1e-3, atol=2e-5), name
    said = capfd.readouterr().out
    assert "masked 2 of 3 ranks have 3 sequences, 1 of 3 ranks has 2 sequences and 1 masked" in said
    assert "layout changed: from 1 rank (dp 1 x sp 1, ZeRO-0) to 2 ranks (dp 1 x sp 2, ZeRO-1), new seeds" in said


def test_carried_state_moves_with_its_rows_to_other_ranks(go, tmp_path):
    streaming = ("data.mode=streaming", "train.carry=true")
    go("whole", (1, 1, 1), 8, *streaming, "train.micro_sequences=2")
    for done, (layout, micro) in enumerate([((1, 1, 1), 4), ((2, 2, 2), 2), ((3, 1, 3), 2), ((1, 1, 1), 2)]):
        go("hops", layout, 2 * (done + 1), *streaming, f"train.micro_sequences={micro}")
    assert torch.allclose(losses(tmp_path / "hops"), losses(tmp_path / "whole"), rtol=2e-6)


def test_losses_with_masked_documents_are_equal_under_any_layout(go, tmp_path, capfd):
    longer = ("train.sequence_length=256",)  # documents begin in it
    masked = (*longer, "data.documents=masked", "data.packing=best_fit")
    go("whole", (1, 1, 1), 3, *masked)
    for done, layout in enumerate([(2, 1, 1), (1, 1, 1), (2, 2, 1)]):
        go("hops", layout, done + 1, *masked)
    assert torch.allclose(losses(tmp_path / "hops"), losses(tmp_path / "whole"), rtol=2e-6)
    go("joined", (1, 1, 1), 1, *longer)
    assert not torch.equal(losses(tmp_path / "joined")[:1], losses(tmp_path / "whole")[:1])
    said = capfd.readouterr().out
    assert said.count("\ndocs   masked, packing: best_fit\n") == 4
    assert said.count("\ndocs   joined, packing: stream\n") == 1


def test_muon_momentum_survives_layout_changes_and_is_the_only_matrix_state(go, tmp_path):
    muon = ("optimizer.kind=muon", "optimizer.learning_rate=3e-3", "schedule.warmup_steps=0")
    go("whole", (1, 1, 1), len(HOPS), *muon)
    for done, layout in enumerate(HOPS):
        go("hops", layout, done + 1, *muon)
    assert torch.allclose(losses(tmp_path / "hops"), losses(tmp_path / "whole"), rtol=2e-6)
    whole, hops = (load_weights(directory(tmp_path / run, len(HOPS))) for run in ("whole", "hops"))
    for name, tensor in whole.items():
        assert torch.allclose(tensor, hops[name], rtol=1e-3, atol=2e-5), name
    for done in range(1, len(HOPS) + 1):
        stored = open_shards(directory(tmp_path / "hops", done), OPTIMIZER)
        first = stored.all_of(name for name in stored.shapes if name.startswith("exp_avg/"))
        names = {name.partition("/")[2]: momentum for name, momentum in first.items()}
        assert names.keys() == whole.keys()
        assert all(momentum.any() for momentum in names.values())
        second = {name.partition("/")[2] for name in stored.shapes if name.startswith("exp_avg_sq/")}
        assert "layers.0.ffn.up.weight" not in second
        assert "embedding.weight" in second


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_resumed_muon_run_is_bitwise_equal(go, tmp_path, stage):
    muon = ("optimizer.kind=muon", "train.gradient_clipping=0.1")
    go("whole", (2, 1, stage), 4, *muon)
    for until in (1, 3, 4):
        go("parts", (2, 1, stage), until, *muon)
    assert torch.equal(losses(tmp_path / "parts"), losses(tmp_path / "whole"))
    whole, parts = (load_weights(directory(tmp_path / run, 4)) for run in ("whole", "parts"))
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())


def test_changing_the_optimizer_kind_on_resume_is_refused(go, tmp_path):
    go("run", (1, 1, 1), 1)
    with pytest.raises(AssertionError, match=r"optimizer\.kind: 'adamw', 'muon'"):
        go("run", (1, 1, 1), 2, "optimizer.kind=muon")
