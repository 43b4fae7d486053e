"""The gradient of a step is that of the mean loss over all its valid tokens, in every layout."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import deepspeed
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bst_dist.faults.signals import Stop
from bst_dist.model.lm import LanguageModel
from bst_dist.model.roles import products_only
from bst_dist.parallel.mesh import Mesh
from bst_dist.parallel.ranks import Ranks
from bst_dist.report.metrics import StepReport
from bst_dist.train import building
from bst_dist.train import engine as engines
from bst_dist.train.engine import Engine
from bst_dist.train.start.request import Request, Start, load, resolve
from bst_dist.train.step import on_device

pytestmark = pytest.mark.ranks
PARTIAL = ("every-kth-layer", "selective", "offload")
CASES = [
    *((f"zero{stage}", micro, policy) for stage in range(4) for micro, policy in ((2, "none"), (1, "every-layer"))),
    *(
        (f"zero{stage}", 1, policy)
        for stage in (2, 3)
        for policy in ("none", "every-kth-layer", "selective", "offload")
    ),
    ("zero3_cpu_offload", 1, "none"),
    ("zero3_hierarchical", 1, "selective"),
    ("zero3_gathered_once", 2, "none"),
]


def overrides(strategy: str, micro: int, policy: str) -> list[str]:
    return [
        f"deepspeed=ds_configs/{strategy}.json",
        f"train.micro_sequences={micro}",
        f"activation_checkpointing.policy={policy}",
    ]


def start_of(recipe: Path, world: int, changes: list[str]) -> Start:
    request = Request(recipe, changes, recipe.parent / "never-written", resume=False, until=None)
    start = resolve(load(request), request, world)
    zero = start.completed["zero_optimization"]
    if zero["stage"] == 3 and "gathered_once" not in start.recipe.deepspeed:  # else all parameters would stay whole
        zero["stage3_param_persistence_threshold"] = 0
    return start


def one_process(recipe: Path) -> tuple[dict[str, np.ndarray], float]:
    """Return gradients and loss of plain torch: all rows at once, in one process, in double precision."""
    start = start_of(recipe, 1, ["train.micro_sequences=4"])
    torch.manual_seed(start.recipe.seed)
    model = LanguageModel(start.recipe.model).double()
    (batch,) = start.objective.loader(Mesh(1, 0)).batches(0)
    inputs = on_device(batch, torch.device("cpu"))
    loss = model(**inputs).total / inputs["loss_mask"].sum()
    loss.backward()
    return {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}, loss.item()


def one_step(ranks: Ranks, recipe: Path, changes: list[str]) -> tuple[dict[str, np.ndarray], StepReport]:
    """Take the first step on these ranks; return the full gradients before the update, and the step's report."""
    start = start_of(recipe, ranks.world, changes)
    engine = building.build_engine(start, ranks)
    sharing = Mesh(ranks.world, ranks.rank, start.recipe.parallel.sp).sp_group()
    trainer = building.build_trainer(start, engine, ranks, sharing, Stop(ranks))
    gradients: dict[str, np.ndarray] = {}

    def update() -> float:
        for name, parameter in engine.module.named_parameters():
            gradients[name] = deepspeed.utils.safe_get_full_grad(parameter).numpy().copy()
        return Engine.update(engine)

    engine.update = update
    report = trainer.step(0, start.objective.loader(start.mesh(ranks)).batches(0), began=0.0)
    engine.deepspeed.destroy()
    return gradients, report


def test_gradients_of_two_ranks_equal_one_process_in_every_stage(recipe_file, on_ranks, unmeasured):
    recipe = recipe_file(data={"documents": "isolated"})  # some tokens are masked, unevenly over the ranks
    expected, loss = one_process(recipe)
    norm = np.sqrt(sum((gradient**2).sum() for gradient in expected.values()))

    def steps(ranks: Ranks) -> list:
        return [one_step(ranks, recipe, overrides(*case)) for case in CASES]

    for case, (gradients, report) in zip(CASES, on_ranks(2, steps)[0], strict=True):
        assert report.loss_nats == pytest.approx(loss, rel=1e-6), case
        assert report.gradient_norm == pytest.approx(norm, rel=1e-5), case
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            error = np.linalg.norm(gradient - expected[name]) / np.linalg.norm(expected[name])
            assert error < 3e-6, f"{case}: {name} is off by {error:.1e}"


@pytest.mark.parametrize("policy", ["none", "every-layer"])
def test_gathering_matrices_in_bf16_leaves_gradients_bitwise_equal(
    policy, recipe_file, on_ranks, unmeasured, monkeypatch
):
    """Autocast rounds them in any case. The first step is compared with one that gathers in fp32."""
    recipe = recipe_file(train={"precision": "bf16"}, model={"tied": False})
    halve = engines._gather_in_bf16

    def steps(ranks: Ranks) -> list:
        found = []
        for gathers in (lambda engine: None, halve):
            monkeypatch.setattr(engines, "_gather_in_bf16", gathers)
            sent = Sent()
            with sent:
                gradients, report = one_step(ranks, recipe, overrides("zero3", 2, policy))
            found.append((gradients, report.loss_nats, report.gradient_norm, sent))
        return [(*one, sent.gathered, sent.reduced) for *one, sent in found]

    single, half = on_ranks(2, steps)[0]
    assert single[1:3] == half[1:3]
    assert all(np.array_equal(gradient, half[0][name]) for name, gradient in single[0].items())
    assert set(single[4]) == set(half[4]) == {torch.float32}  # gradients
    assert set(single[3]) == {torch.float32}
    assert sum(half[3].values()) == single[3][torch.float32]
    model = LanguageModel(start_of(recipe, 2, overrides("zero3", 2, policy)).recipe.model)
    matrices = sum(one.numel() for module in model.modules() for one in products_only(module))
    assert half[3][torch.bfloat16] >= 2 * matrices - model.output.weight.numel()  # some stay gathered between passes


class Sent(TorchDispatchMode):
    """Counts elements, by dtype, in all-gathers and in reduce-scatters."""

    def __init__(self) -> None:
        super().__init__()
        self.gathered: Counter[torch.dtype] = Counter()
        self.reduced: Counter[torch.dtype] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for name, count in (("_allgather_base_", self.gathered), ("_reduce_scatter_base_", self.reduced)):
            if func.namespace == "c10d" and func.__name__.startswith(name):
                count[args[0].dtype] += args[0].numel()
        return func(*args, **(kwargs or {}))


def test_the_z_loss_affects_gradients_but_not_the_reported_loss(recipe_file, on_ranks, unmeasured):
    """Compared with the formula in double precision in one process; with tied and separate head, slices and ranks."""
    weight = 0.05
    recipe = recipe_file(data={"documents": "isolated"}, train={"z_loss": weight})
    cases = [
        [f"deepspeed=zero{stage}", f"model.tied={tied}", *layout]
        for stage, tied, layout in (
            (1, "true", ["parallel.sp=2"]),
            (2, "false", ["train.slice_tokens=16"]),
            (3, "false", []),
        )
    ]
    expected = {tied: literal_z_loss(recipe, weight, tied) for tied in ("true", "false")}

    def steps(ranks: Ranks) -> list:
        return [one_step(ranks, recipe, case) for case in cases]

    for case, (gradients, report) in zip(cases, on_ranks(2, steps)[0], strict=True):
        wanted, nats, squares = expected[case[1].partition("=")[2]]
        assert report.loss_nats == pytest.approx(nats, rel=1e-6), case
        assert report.z_loss == pytest.approx(weight * squares, rel=1e-5), case
        assert gradients.keys() == wanted.keys()
        for name, gradient in gradients.items():
            error = np.linalg.norm(gradient - wanted[name]) / np.linalg.norm(wanted[name])
            assert error < 3e-6, f"{case}: {name} is off by {error:.1e}"


def literal_z_loss(recipe: Path, weight: float, tied: str) -> tuple[dict[str, np.ndarray], float, float]:
    """Return gradients, mean nats and mean of log² Z, from all logits at once."""
    start = start_of(recipe, 1, ["train.micro_sequences=4", f"model.tied={tied}"])
    torch.manual_seed(start.recipe.seed)
    model = LanguageModel(start.recipe.model).double()
    (batch,) = start.objective.loader(Mesh(1, 0)).batches(0)
    inputs = on_device(batch, torch.device("cpu"))
    stream = model.norm(model.hidden(inputs["input_ids"], inputs["starts"]))
    logits = stream @ model.head_matrix.T / start.recipe.model.width**0.5
    log_z, mask = logits.logsumexp(-1), inputs["loss_mask"]
    nats = (log_z - logits.gather(-1, inputs["labels"].unsqueeze(-1)).squeeze(-1))[mask].mean()
    squares = log_z.square()[mask].mean()
    (nats + weight * squares).backward()
    return {name: p.grad.numpy() for name, p in model.named_parameters()}, nats.item(), squares.item()
