"""Compiled layers under ZeRO-3: each layer is gathered as a whole before it runs, and released after it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd.graph import saved_tensors_hooks

from bst_base.json_lines import read_lines
from bst_dist.activation import selective
from bst_dist.config import Recipe, load_recipe
from bst_dist.model.attention import flex
from bst_dist.model.layers import Layer
from bst_dist.parallel.ranks import Ranks
from bst_dist.parallel.sequence.past import Past
from bst_dist.report.metrics import FILE
from bst_dist.train import run as runs
from bst_dist.train.start.request import Request
from bst_dist.verify import step as steps
from bst_dist.verify.batches import _batch
from tests.cuda_path.models import LENGTH, VOCABULARY, build
from tests.cuda_path.test_compiled import made_up, worst

SLIDING = {"width": 32, "block": 128, "depth": 3, "mixer": "sliding"}
SH = {"width": 32, "block": 128, "depth": 2, "placement": [1], "ssm": {"state": 4}}


class Whole:
    """Tracks the gathered weights of layers on this rank, by their storages, whoever keeps them alive."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, weakref.ref]] = []
        self.between: set[str] = set()
        """Parameters that were still whole after their layer was released."""
        self.excess = 0
        """Most gathered bytes beyond those of the running layer."""
        self.passes: list[bool] = []
        """For each gathering of a layer, whether it was in the forward pass."""

    def alive(self) -> dict[str, int]:
        """Return the bytes of gathered weights, by name."""
        storages = [(name, storage()) for name, storage in self.seen]
        return {name: storage.nbytes() for name, storage in storages if storage is not None}

    @contextmanager
    def watching(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        fetch, release = Coordinator.fetch_sub_module, Coordinator.release_sub_module

        def fetched(coordinator: Any, module: nn.Module, forward: bool) -> None:
            fetch(coordinator, module, forward)
            if isinstance(module, Layer):
                self.passes.append(forward)
                named = [(f"{module.ds_id} {name}", p.untyped_storage()) for name, p in module.named_parameters()]
                assert all(storage.nbytes() for _, storage in named)
                self.seen += [(name, weakref.ref(storage)) for name, storage in named]
                self.excess = max(self.excess, sum(self.alive().values()) - sum(x.nbytes() for _, x in named))

        def released(coordinator: Any, module: nn.Module, forward: bool = False) -> None:
            release(coordinator, module, forward)
            # A layer recomputed in the backward pass is needed again at once, for its own backward.
            if isinstance(module, Layer) and not (forward and torch._C._current_graph_task_id() != -1):
                self.between |= set(self.alive())

        with monkeypatch.context() as patched:
            patched.setattr(Coordinator, "fetch_sub_module", fetched)
            patched.setattr(Coordinator, "release_sub_module", released)
            yield


def give_up_at_once(strategy: dict[str, Any]) -> dict[str, Any]:
    """Return a strategy that shards every parameter and releases each one after its use."""
    sizes = {
        "reduce_bucket_size": 8192,
        "allgather_bucket_size": 8192,
        "stage3_prefetch_bucket_size": 0,
        "stage3_param_persistence_threshold": 0,
        "stage3_max_reuse_distance": 0,
    }
    return {**strategy, "zero_optimization": {**strategy["zero_optimization"], **sizes}}


@pytest.fixture
def stepping(recipe_file, monkeypatch) -> Callable[..., Callable[..., Any]]:
    """``stepping(model, policy, precision)`` returns ``step(ranks, stage, compiled)``.

    ``step`` trains one step with micro-batches of two rows and of one, and returns the gradients and the number of
    graphs.
    """

    def of(model: dict[str, Any], policy: str, precision: str) -> Callable[..., Any]:
        train = {"sequence_length": LENGTH, "sequences": 4, "micro_sequences": 2, "precision": precision}
        recipes = {
            stage: load_recipe(
                recipe_file(
                    deepspeed=f"ds_configs/zero{stage}.json",
                    model={**model, "vocab_size": VOCABULARY},
                    train=train,
                    activation_checkpointing={"policy": policy},
                )
            )
            for stage in (1, 3)
        }
        counter, seeded = CompileCounterWithBackend("aot_eager"), steps.seeded_model
        monkeypatch.setattr(flex, "BACKEND", counter)
        monkeypatch.setattr(steps, "small_buckets", give_up_at_once)
        monkeypatch.setattr(
            steps,
            "batches",
            lambda *_: [_batch(*made_up(recipes[3]), one, range(LENGTH), 128) for one in (range(2), range(2, 3))],
        )

        def step(ranks: Ranks, stage: int, compiled: bool) -> tuple[list[Tensor], int]:
            def build_it(recipe: Recipe) -> nn.Module:
                model = seeded(recipe)
                for layer in model.layers:
                    layer.compiled = compiled
                model.fused_loss = compiled
                return model

            monkeypatch.setattr(steps, "seeded_model", build_it)
            counter.clear()
            found = steps.distributed_step(recipes[stage], ranks, None)
            return list(found.gradients.values()), counter.frame_count

        return step

    return of


@pytest.mark.parametrize(
    ("model", "policy", "precision"),
    [(SLIDING, "selective", "bf16"), (SLIDING, "offload", "fp32"), (SH, "every-layer", "fp32")],
)
def test_each_layer_is_gathered_and_released_as_a_whole(model, policy, precision, stepping, on_ranks, monkeypatch):
    """The gradients equal those of uncompiled layers and of ZeRO-1; one graph per kind of layer and number of rows."""
    step = stepping(model, policy, precision)

    def compare(ranks: Ranks) -> tuple[list[float], list[int], set[str], int, list[bool]]:
        whole = Whole()
        with whole.watching(monkeypatch):
            found, graphs = step(ranks, 3, compiled=True)
        others = [step(ranks, 3, compiled=False), step(ranks, 1, compiled=True)]
        errors = [worst(found, exact) for exact, _ in others]
        return errors, [graphs, others[0][1]], whole.between, whole.excess, whole.passes

    kinds, depth = 2 if model is SH else 1, model["depth"]
    for errors, graphs, between, excess, passes in on_ranks(2, compare):
        assert max(errors) < (1e-5 if precision == "fp32" else 1e-2)  # would be 1 if one layer's gradient were missing
        assert graphs == [2 * kinds + 2, 2]  # layers and loss for both shapes; uncompiled: FlexAttention for both
        assert (between, excess) == (set(), 0)
        backward = [False] if policy == "selective" else [True, False]  # recomputation is part of the graph
        assert passes == ([True] * depth + backward * depth) * 2


def test_weights_kept_after_their_release_are_detected(stepping, on_ranks, monkeypatch):
    """The test above would fail if graphs kept aliases of gathered weights instead of the parameters."""
    step = stepping(SLIDING, "selective", "fp32")

    def hold(ranks: Ranks) -> tuple[set[str], int]:
        whole = Whole()
        with whole.watching(monkeypatch), saved_tensors_hooks(lambda x: x.detach(), lambda x: x):
            step(ranks, 3, compiled=True)
        return whole.between, whole.excess

    between, excess = on_ranks(1, hold)[0]
    assert any("ffn.out.weight" in name for name in between)
    assert excess > 8192


@pytest.mark.parametrize("name", ["SH", "sliding T5"])
def test_selective_checkpointing_keeps_no_copy_of_a_matrix(name, monkeypatch):
    """Autocast makes a copy of each matrix, which DeepSpeed does not know of."""
    monkeypatch.setattr(nn.functional, "linear", zero3_linear_wrap)
    layer, kept = build(name).layers[1], []
    layer.compiled = True
    x = torch.randn(2, LENGTH, 32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16), saved_tensors_hooks(lambda one: kept.append(one) or one, lambda x: x):
        layer(x, Past(), None, selective.keeps)
    parameters = {name: p for name, p in layer.named_parameters() if p.numel() > 64}
    assert len(parameters) >= 4
    assert [name for name, p in parameters.items() if any(is_copy(one, p) for one in kept)] == []


def is_copy(kept: Tensor, parameter: Tensor) -> bool:
    """Whether a tensor contains a copy of a matrix (or of its half for keys) and is not the parameter itself.

    The copy may be transposed, in another precision, or concatenated with other tensors.
    """
    if kept is parameter or kept.dim() < 2 or not kept.is_floating_point():
        return False
    found, wanted = ([bytes_of(way) for way in (one, one.mT)] for one in (kept, parameter.to(kept.dtype)))
    size = RUN * kept.element_size()
    return any(one[:size] in other for one in wanted for other in found)


RUN = 16
"""Length of a run of equal numbers that cannot be a coincidence; the width of a head."""


def bytes_of(x: Tensor) -> bytes:
    return x.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def test_compiled_graphs_use_the_linear_map_of_torch(monkeypatch):
    """DeepSpeed's linear makes torch 2.11 compile each layer separately; torch 2.13 does not."""

    def refused(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(nn.functional, "linear", refused)
    layer = build("sliding RoPE").layers[0]
    x = torch.randn(2, LENGTH, 32, requires_grad=True)
    with pytest.raises(AssertionError):
        layer(x, Past(), None)
    layer.compiled = True
    layer(x, Past(), None).sum().backward()
    assert nn.functional.linear is refused


def test_a_graph_without_a_checkpointing_policy_keeps_a_copy(monkeypatch):
    """This is why layers that keep their activations are not compiled under ZeRO-3."""
    monkeypatch.setattr(nn.functional, "linear", zero3_linear_wrap)
    layer, kept = build("SH").layers[1], []
    layer.compiled = True
    x = torch.randn(2, LENGTH, 32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16), saved_tensors_hooks(lambda one: kept.append(one) or one, lambda x: x):
        layer(x, Past(), None)
    assert any(is_copy(one, layer.mixer.cross.context.key_value) for one in kept)


def test_a_run_compiles_only_in_its_first_step_and_resumes_bitwise_equal(
    recipe_file, on_ranks, tmp_path, unmeasured, assert_same_run, monkeypatch
):
    """With an evaluation in between. DeepSpeed records the order of the layers once, as with uncompiled layers."""
    recipe = recipe_file(
        deepspeed="ds_configs/zero3.json",
        model=SLIDING,
        evaluation={"every": 2, "sequences": 4},
        train={"sequence_length": LENGTH, "sequences": 4, "micro_sequences": 1, "steps": 5, "precision": "fp32"},
        activation_checkpointing={"policy": "every-layer"},
        checkpoint={"every": 3},
    )
    counter, forgotten, after = CompileCounterWithBackend("aot_eager"), [], []
    forget, step = Coordinator._invalidate_trace, runs.build_trainer
    monkeypatch.setattr(flex, "BACKEND", counter)
    monkeypatch.setattr(Coordinator, "_invalidate_trace", lambda it: forgotten.append(it) or forget(it))

    def counting(*args: Any) -> Any:
        trainer = step(*args)
        take = trainer.step
        trainer.step = lambda *args: (take(*args), after.append(counter.frame_count))[0]
        return trainer

    monkeypatch.setattr(runs, "build_trainer", counting)

    def go(ranks: Ranks, run: str, compiled: bool, until: int | None = None) -> tuple[list[int], int, int]:
        monkeypatch.setattr(runs, "compiles", lambda *_: (compiled, ""))
        runs.train(Request(recipe, [], tmp_path / run, until != 3, until), ranks)
        return after, counter.frame_count, len(forgotten)

    parts = [on_ranks(2, go, "parts", True, until)[0] for until in (3, None)]
    whole, plain = (on_ranks(2, go, run, compiled)[0] for run, compiled in (("whole", True), ("plain", False)))
    assert whole == ([1, 1, 2, 2, 2], 2, plain[2])  # graphs of the layers, and of the evaluation's FlexAttention
    assert [one[0] for one in parts] == [[1, 1, 2], [1, 2]]  # evaluations follow steps 2 and 4
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    losses = [[line["loss_nats"] for line in read_lines(tmp_path / run / FILE)] for run in ("whole", "plain")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] != losses[1]  # because the kernels differ
