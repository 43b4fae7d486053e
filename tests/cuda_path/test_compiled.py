"""Layers compiled to one graph each: no graph breaks, few graphs, and results equal to the uncompiled layer."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import get_args

import numpy as np
import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from bst_base.settings import ConfigError, parse
from bst_dist.activation import policy as activation
from bst_dist.activation import selective
from bst_dist.activation.config import ActivationCheckpointingConfig
from bst_dist.config import Recipe, load_recipe
from bst_dist.model import matmul
from bst_dist.model.attention import flex, self_attention, sliding
from bst_dist.parallel.sequence.past import Past
from bst_dist.train.building import compiles, fuses_loss
from bst_dist.verify.batches import _batch
from bst_dist.verify.judge import ErrorLimits, judge, whole_error
from tests.cuda_path.models import LENGTH, VOCABULARY, build, tokens


def build_and_lose(name: str, compiled: bool, policy: str = "none", starts: Tensor | None = None):
    """Return the model and its loss."""
    model = build(name)
    model.checkpoint = activation.policy(ActivationCheckpointingConfig(policy=policy), model.layers)
    for layer in model.layers:
        layer.compiled = compiled
    return model, model(*tokens(), starts=starts).total


def gradients(name: str, compiled: bool, policy: str = "none", starts: Tensor | None = None) -> list[Tensor]:
    model, total = build_and_lose(name, compiled, policy, starts)
    total.backward()
    return [total.detach(), *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]


def made_up(recipe: Recipe) -> tuple[np.ndarray, np.ndarray, None]:
    """Return random tokens, a loss mask, and no document starts."""
    generator, rows = np.random.default_rng(0), recipe.train.sequences
    ids = generator.integers(0, VOCABULARY, (rows, LENGTH + 1))
    return ids, generator.random((rows, LENGTH)) < 0.7, None


def worst(found: list[Tensor], exact: list[Tensor]) -> float:
    return max(float((a - b).norm() / b.norm().clamp_min(1e-6)) for a, b in zip(found, exact, strict=True))


@pytest.mark.parametrize("name", ["SH", "MF", "SH joint", "Block-Recurrent"])
def test_a_compiled_layer_is_one_whole_graph_with_the_same_gradients(name):
    assert worst(gradients(name, compiled=True), gradients(name, compiled=False)) < 1e-5


@pytest.mark.parametrize("name", ["SH", "MF"])
def test_under_autocast_a_compiled_layer_computes_gradients_in_the_same_precision(name):
    """The SSM's gradients are in fp32. If backward were traced under autocast, its products would be in bf16."""
    with torch.autocast("cpu", torch.bfloat16):
        losses = [build_and_lose(name, compiled) for compiled in (True, False)]
    found = []
    for model, total in losses:
        total.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if ".ssm." in name})
    assert len(found[0]) == 5
    assert worst(list(found[0].values()), list(found[1].values())) < 1e-6


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("position", ["rope", "t5"])
def test_masks_and_tables_are_built_once_outside_the_layer_graphs(compiled, position, monkeypatch):
    made = []
    for name in ("visited_tiles", "documents_of", "angles"):
        real = getattr(self_attention, name)
        monkeypatch.setattr(self_attention, name, lambda *a, name=name, real=real: made.append(name) or real(*a))
    traced = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]):
        traced.extend(node.target for node in graph.graph.nodes)
        return graph.forward

    monkeypatch.setattr(flex, "BACKEND", backend)
    model = build("SH", placement="all", attention={"position": position})
    for layer in model.layers:
        layer.compiled = compiled
    model(*tokens(), starts=torch.tensor([[False, True], [True, False]]))
    assert sorted(made) == [*(["angles"] if position == "rope" else []), "documents_of", "visited_tiles"]
    assert not {torch.searchsorted, operator.rshift} & set(traced)  # of documents, and of tiles


def test_compiled_layers_support_documents_and_checkpointing():
    starts = torch.tensor([[False, True], [True, False]])
    plain = gradients("SH", compiled=False, starts=starts)
    assert worst(gradients("SH", compiled=True, policy="every-layer", starts=starts), plain) < 1e-5


@pytest.mark.parametrize("name", ["SH", "MF", "sliding T5", "full T5", "Block-Recurrent"])
def test_selective_checkpointing_is_part_of_a_compiled_layer(name, monkeypatch):
    """A layer's graph keeps no more than the uncompiled policy does, and does not recompute attention."""
    plain = gradients(name, compiled=False)
    kept_uncompiled = []
    alias = selective._alias
    monkeypatch.setattr(selective, "_alias", lambda result: alias(kept_uncompiled.append(result) or result))
    layer, x = build(name).layers[1], torch.randn(2, LENGTH, 32, requires_grad=True)
    checkpointing = activation.policy(ActivationCheckpointingConfig(policy="selective"), [layer])
    checkpointing(layer, x, Past(), None)
    assert kept_uncompiled

    graphs: dict[str, list[str]] = {}
    monkeypatch.setattr(flex, "BACKEND", recording(graphs))
    parameters, kept = set(map(storage_of, layer.parameters())), {}
    layer.compiled = True
    with saved_tensors_hooks(lambda one: kept.setdefault(storage_of(one), one), lambda one: one):
        checkpointing(layer, x, Past(), None).sum().backward()
    allowed = {storage_of(one) for one in tree_leaves([x, kept_uncompiled]) if isinstance(one, Tensor)}
    assert sum(nbytes for _, nbytes in set(kept) - parameters) <= sum(nbytes for _, nbytes in allowed)
    again = [operation for operation in graphs["backward"] if "attention" in operation and "backward" not in operation]
    assert not again
    assert any("attention" in operation for operation in graphs["forward"])

    monkeypatch.setattr(flex, "BACKEND", "aot_eager")
    assert worst(gradients(name, compiled=True, policy="selective"), plain) < 1e-5


def recording(graphs: dict[str, list[str]]) -> Callable:
    """Return a backend like aot_eager that records the operations of both passes."""

    def keep(which: str) -> Callable:
        def compiler(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
            graphs[which] = [str(node.target) for node in graph.graph.nodes]
            return make_boxed_func(graph.forward)

        return compiler

    return aot_autograd(
        fw_compiler=keep("forward"), bw_compiler=keep("backward"), partition_fn=min_cut_rematerialization_partition
    )


def storage_of(x: Tensor) -> tuple[int, int]:
    """Return the address and the size in bytes of a tensor's storage."""
    return x.untyped_storage().data_ptr(), x.untyped_storage().nbytes()


def test_layers_of_one_kind_share_a_graph_also_in_evaluation(monkeypatch):
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(flex, "BACKEND", counter)
    model = build("SH", depth=5, placement=[1, 3])
    model.checkpoint = activation.policy(ActivationCheckpointingConfig(policy="selective"), model.layers)
    for layer in model.layers:
        layer.compiled = True
    model(*tokens())
    assert counter.frame_count == 2
    with torch.no_grad():
        model(*tokens(rows=3))
    assert counter.frame_count == 3  # one more: FlexAttention alone


@pytest.mark.parametrize(("stage", "policy"), [(1, "every-kth-layer"), (2, "selective")])
def test_a_deepspeed_step_has_the_gradients_of_uncompiled_layers(stage, policy, recipe_file, on_ranks, monkeypatch):
    """Micro-batches have two rows and one, so each kind of layer has a graph for both shapes, and so has the loss.

    If uncompiled layers use the same fused products, the gradients only differ in the order of sums. Normally they use
    one product per map, and bf16 rounds at other places; then both are compared with float64.
    """
    from bst_dist.verify import reference
    from bst_dist.verify import step as steps

    model = {"width": 32, "block": 128, "depth": 3, "placement": [1], "vocab_size": VOCABULARY, "ssm": {"state": 4}}
    train = {"sequence_length": LENGTH, "sequences": 4, "micro_sequences": 2, "precision": "bf16", "z_loss": 1e-4}
    recipe = load_recipe(
        recipe_file(
            deepspeed=f"ds_configs/zero{stage}.json",
            model=model,
            train=train,
            activation_checkpointing={"policy": policy},
        )
    )
    rows, seeded = [range(2), range(2, 3)], steps.seeded_model
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(flex, "BACKEND", counter)
    for module in (steps, reference):
        monkeypatch.setattr(
            module, "batches", lambda *_: [_batch(*made_up(recipe), one, range(LENGTH), 128) for one in rows]
        )

    def compute(ranks, compiled: bool, as_compiled: Callable[[], bool]) -> reference.Step:
        def build(recipe: Recipe):
            model = seeded(recipe)
            for layer in model.layers:
                layer.compiled = compiled
            model.fused_loss = compiled
            return model

        with monkeypatch.context() as patch:
            patch.setattr(steps, "seeded_model", build)
            patch.setattr(matmul, "is_compiling", as_compiled)
            return steps.distributed_step(recipe, ranks, None)

    def compare(ranks) -> tuple[int, float, float, bool, float]:
        by_map = compute(ranks, False, lambda: False)
        same_products = compute(ranks, False, lambda: True)
        counter.clear()
        compiled = compute(ranks, True, matmul.is_compiling)
        monkeypatch.setattr(sliding, "attention_path", lambda device: "tiles")
        exact = reference.one_process(recipe, "fp64", 2)
        return (
            counter.frame_count,
            abs(compiled.loss / same_products.loss - 1),
            worst(*(list(one.gradients.values()) for one in (compiled, same_products))),
            judge(compiled, ErrorLimits.of(exact, [by_map])).passed,
            whole_error(compiled, exact) / whole_error(by_map, exact),
        )

    graphs, loss_error, error, as_near_to_float64, of_uncompiled = on_ranks(1, compare)[0]
    assert graphs == 6  # two kinds of layers and the loss
    assert loss_error < 1e-6
    assert error < 1e-5
    assert as_near_to_float64
    assert of_uncompiled < 1.1  # both errors are from rounding to bf16, which the compiled layer does less often


@pytest.mark.parametrize(
    ("change", "device", "stage", "reason"),
    [
        ({}, "cpu", 1, "this is cpu"),
        ({}, "cuda", 3, "ZeRO-3 .* every-layer, selective or offload"),
        ({"activation_checkpointing": {"policy": "every-kth-layer"}}, "cuda", 3, "ZeRO-3"),
        ({"parallel": {"sp": 2}}, "cuda", 1, "parallel.sp"),
        ({"train": {"slice_tokens": 16}}, "cuda", 1, "train.slice_tokens"),
    ],
)
def test_unsupported_compilation_is_refused_with_the_reason(settings, change, device, stage, reason):
    with pytest.raises(ConfigError, match=f"compile: true cannot be done here: .*{reason}"):
        changed = {section: settings.get(section, {}) | values for section, values in change.items()}
        compiles(parse(Recipe, settings | changed | {"compile": True}), device, stage)


def test_layers_are_compiled_on_cuda_where_supported(settings):
    assert compiles(parse(Recipe, settings), "cuda", 2) == (True, "")
    assert compiles(parse(Recipe, settings), "cpu", 2)[0] is False
    for policy in get_args(ActivationCheckpointingConfig.model_fields["policy"].annotation):
        recipe = parse(Recipe, settings | {"activation_checkpointing": {"policy": policy}})
        assert compiles(recipe, "cuda", 2) == (True, "")
        assert compiles(recipe, "cuda", 3)[0] is (policy in ("every-layer", "selective", "offload"))
    assert compiles(parse(Recipe, settings | {"compile": True}), "cuda", 2) == (True, "")
    assert compiles(parse(Recipe, settings | {"compile": False}), "cuda", 2) == (False, "no, compile: false")
    assert compiles(load_recipe("launch/recipes/bst-7b.yaml"), "cuda", 3) == (True, "")


def test_the_loss_is_compiled_on_cuda_unless_the_recipe_forbids_it(settings):
    in_slices = settings | {"train": settings["train"] | {"slice_tokens": 16}}  # layers are not compiled
    for recipe, device, expected in [
        (settings, "cuda", True),
        (settings, "cpu", False),
        (in_slices, "cuda", True),
        (settings | {"compile": False}, "cuda", False),
    ]:
        assert fuses_loss(parse(Recipe, recipe), device) is expected
