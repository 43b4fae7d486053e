"""A training step on a dp x sp mesh, in every ZeRO stage, equals one process: loss, norm and every gradient."""

from __future__ import annotations

import os
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from bst_dist.activation import policy as activation
from bst_dist.activation.config import ActivationCheckpointingConfig
from bst_dist.faults.signals import Stop
from bst_dist.model.config import ModelConfig
from bst_dist.model.lm import LanguageModel
from bst_dist.parallel.mesh import Mesh
from bst_dist.report.utilisation import Utilisation
from bst_dist.train.config import OptimizerConfig, ScheduleConfig, TrainConfig
from bst_dist.train.context import Context
from bst_dist.train.step import Trainer
from data_pipeline.serve.spread import Spread

BLOCK, LENGTH, ROWS, MICRO_ROWS, VOCABULARY = 8, 32, 8, 2, 29
TOLERANCE = 2e-5
"""Relative tolerance in fp32, because training sums in another order."""


def model(variant: str) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(
        ModelConfig(
            width=16,
            heads=2,
            ffn=24,
            block=BLOCK,
            depth=2,
            mixer="bst",
            vocab_size=VOCABULARY,
            context={"variant": variant, "states": 3},
            ssm={"state": 4, "chunk": 4, "dt_min": 0.01},
        )
    )


def batches(mesh: Mesh, isolated: bool) -> list[SimpleNamespace]:
    """Return the micro-batches of one rank, cut from the same global batch for every mesh; many labels are masked."""
    generator = np.random.default_rng(0)
    ids = generator.integers(0, VOCABULARY, (ROWS, LENGTH + 1))
    mask = generator.random((ROWS, LENGTH)) < np.linspace(0.1, 0.9, ROWS)[:, None]
    starts = generator.random((ROWS, LENGTH // BLOCK)) < 0.3
    length = LENGTH // mesh.sp
    ids, mask, starts = (np.append(rows, rows[:1], 0) for rows in (ids, mask, starts))  # for masked rows
    mask[-1] = False
    tokens = slice(mesh.sp_rank * length, (mesh.sp_rank + 1) * length)
    blocks = slice(tokens.start // BLOCK, tokens.stop // BLOCK)
    found = []
    for rows in Spread(ROWS, mesh.dp, MICRO_ROWS).of_micro_batches(mesh.dp_rank):
        part = {"input_ids": ids[rows, :-1], "labels": ids[rows, 1:], "loss_mask": mask[rows]}
        part = {name: values[:, tokens] for name, values in part.items()}
        found.append(SimpleNamespace(**part, starts=starts[rows][:, blocks] if isolated else None))
    return found


def step(variant: str, isolated: bool, again: bool, stage: int, sp: int) -> dict[str, Any]:
    """Take one step of the trainer on all ranks; return what it reports, and the full gradients."""
    from bst_dist.parallel.ranks import Ranks
    from bst_dist.train.deepspeed_json import Intent, complete
    from bst_dist.train.engine import Engine

    class Recorded(Engine):
        def update(self) -> float:
            from deepspeed.utils import safe_get_full_grad

            full = (lambda p: p.grad) if self.stage == 0 else safe_get_full_grad
            self.gradients = {name: full(p).clone() for name, p in self.module.named_parameters()}
            return super().update()

    ranks = Ranks()
    mesh = Mesh(ranks.world, ranks.rank, sp)
    accumulation = Spread(ROWS, mesh.dp, MICRO_ROWS).micro_batches
    strategy = {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}}
    completed = complete(strategy, Intent(ranks.world, MICRO_ROWS, accumulation, 0.0, "fp32"), "test")
    of = model(variant)
    of.checkpoint = activation.policy(
        ActivationCheckpointingConfig(policy="every-layer" if again else "none"), of.layers
    )
    engine = Recorded(of, OptimizerConfig(), completed)
    config = TrainConfig(steps=1, sequence_length=LENGTH, sequences=ROWS, micro_sequences=MICRO_ROWS, precision="fp32")
    token_bytes = torch.ones(VOCABULARY, dtype=torch.long)
    context = Context(engine, ranks, token_bytes, Stop(ranks), mesh.sp_group())
    trainer = Trainer(config, ScheduleConfig(), 1e-3, context, lambda _: Utilisation(1.0, 1.0))
    report = trainer.step(0, batches(mesh, isolated), time.perf_counter())
    return {"loss": report.loss_nats, "norm": report.gradient_norm, "gradients": engine.gradients}


def one_process(variant: str, isolated: bool) -> dict[str, Any]:
    """Return loss, norm and gradients of the mean loss over all valid tokens, without trainer and DeepSpeed."""
    of, total, tokens = model(variant), 0.0, 0
    for batch in batches(Mesh(1, 0), isolated):
        names = ("input_ids", "labels", "loss_mask", "starts")
        inputs = {n: torch.from_numpy(x) for n in names if (x := getattr(batch, n)) is not None}
        total = total + of(**inputs).total
        tokens += int(inputs["loss_mask"].sum())
    (total / tokens).backward()
    gradients = {name: p.grad for name, p in of.named_parameters()}
    norm = torch.stack([g.norm() for g in gradients.values()]).norm()
    return {"loss": float(total.detach()) / tokens, "norm": float(norm), "gradients": gradients}


def errors(found: dict[str, Any], expected: dict[str, Any]) -> dict[str, float]:
    """Return the relative errors of a step on one rank; for tiny gradients relative to 1e-3 of the largest."""
    least = 1e-3 * max(float(g.norm()) for g in expected["gradients"].values())
    differences = {
        name: float((found["gradients"][name] - wanted).norm() / max(wanted.norm(), least))
        for name, wanted in expected["gradients"].items()
    }
    return differences | {key: abs(found[key] / expected[key] - 1) for key in ("loss", "norm")}


@pytest.mark.ranks
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(("world", "sp"), [(2, 1), (2, 2), (3, 1), (4, 2), (5, 1)])
def test_a_step_on_a_mesh_equals_one_process(on_ranks, stage, world, sp):
    """With joined documents and all activations kept, and with isolated documents and every layer recomputed.

    Three and five ranks do not divide the eight rows: one of three ranks, or two of five, have a masked row.
    """

    def all_cases() -> dict[str, float]:
        os.environ |= {"RANK": str(dist.get_rank()), "LOCAL_RANK": "0", "DS_ACCELERATOR": "cpu"}
        worst = {}
        for (variant, isolated), wanted in expected.items():
            found = step(variant, isolated, isolated, stage, sp)
            worst |= {f"{variant} isolated={isolated} {name}": e for name, e in errors(found, wanted).items()}
        return worst

    expected = {case: one_process(*case) for case in (("SH", False), ("SH", True), ("MF", False), ("MF", True))}
    for found in on_ranks(world, all_cases):
        assert {name: error for name, error in found.items() if not error <= TOLERANCE} == {}
