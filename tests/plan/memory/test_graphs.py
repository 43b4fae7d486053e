"""The planned memory of a compiled layer, compared with traces of the compiler's front end."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bst_dist.activation.config import ActivationCheckpointingConfig
from bst_dist.model.config import ModelConfig
from bst_dist.model.lm import LanguageModel
from bst_dist.plan.memory import graphs
from bst_dist.plan.memory.activations import Activations
from bst_dist.plan.memory.parts import Slice
from bst_dist.plan.memory.peak import Work, _Step
from bst_dist.plan.memory.zero import Strategy

ROWS, LENGTH, WIDTH = 2, 256, 64
SLICE = Slice(ROWS, LENGTH)


def model(mixer: str = "bst", **settings) -> ModelConfig:
    return ModelConfig(
        width=WIDTH,
        heads=2,
        depth=1,
        vocab_size=2,
        mixer=mixer,
        **{"ffn": 256, "block": 64, "placement": "all", "ssm": {"state": 8, "chunk": 32}} | settings,
    )


def part(config: ModelConfig, policy: str, compiled: bool = True, documents: str = "joined"):
    checkpointing = ActivationCheckpointingConfig(policy=policy)
    activations = Activations(config, bf16=True, documents=documents)
    return activations.layer(config.mixers()[0], checkpointing, SLICE, zero3=False, compiled=compiled)


INPUT = 4 * ROWS * LENGTH * WIDTH


def test_recomputed_graph_keeps_only_its_input():
    whole, again, offloaded = (part(model("sliding"), policy) for policy in ("none", "every-layer", "offload"))
    assert again.kept == offloaded.kept == offloaded.host == INPUT
    assert again.kept + again.backward >= whole.kept + whole.backward
    assert again.kept + again.backward >= whole.forward + INPUT  # beside the gradient of its output
    assert offloaded.forward == again.forward + INPUT
    assert whole.launches < again.launches < 2 * whole.launches


@pytest.mark.parametrize("mixer, documents", [("sliding", "isolated"), ("bst", "joined"), ("gated-deltanet", "joined")])
def test_one_trace_is_valid_for_any_number_of_rows(mixer, documents):
    """Compared with a trace of exactly that many rows; Gated DeltaNet has other operations for one row than for two."""
    activations = Activations(model(mixer), bf16=True, documents=documents)
    for rows in (1, 5):
        asked = replace(SLICE, rows=rows)
        alone = activations._graph(mixer, asked)
        for policy in ("none", "selective", "every-layer"):
            found = activations.layer(mixer, ActivationCheckpointingConfig(policy=policy), asked, False, compiled=True)
            assert found == alone.part(policy, rows)
    traced = [key[2].rows for key in activations._known if key[0] == "graph" and len(key) == 3]
    assert traced == [1, 1009]


@pytest.mark.parametrize(
    "mixer, settings",
    [
        ("sliding", {"ffn": 2018}),
        ("bst", {"block": 4032, "ssm": {"state": 8, "chunk": 1008}}),  # powers of the transition from 0 to 1,008
        ("bst", {"context": {"ssm_width": 753}}),  # with 4 x 64 rows of others in one product
    ],
    ids=["feed-forward", "powers", "maps together"],
)
def test_tensors_independent_of_rows_are_recognised_by_size(mixer, settings):
    """Layers with sizes that 1,009 divides, compared with a trace of exactly that many rows."""
    config, policy = model(mixer, **settings), ActivationCheckpointingConfig()
    asked = Slice(3, config.block)
    activations = Activations(config, bf16=True)
    found = activations.layer(mixer, policy, asked, zero3=False, compiled=True)
    assert found == activations._graph(mixer, asked).part("none", 3)


def test_masked_documents_are_traced_for_each_number_of_rows():
    """The table of their borders grows in steps."""
    activations = Activations(model(), bf16=True, documents="masked")
    asked, checkpointing = replace(SLICE, rows=3), ActivationCheckpointingConfig()
    found = activations.layer("bst", checkpointing, asked, zero3=False, compiled=True)
    assert found == activations._graph("bst", asked).part("none", 3)


def test_compiled_layer_has_all_its_gradients_at_once():
    """Tested with a layer whose weights are much larger than everything else."""
    config = ModelConfig(width=512, heads=2, ffn=2048, block=64, depth=1, vocab_size=2, mixer="sliding", ssm={})
    weights = 4 * (4 * 512 * 512 + 2 * 512 * 2048)
    parameters = sum(p.numel() for p in LanguageModel(config).layers[0].parameters())
    checkpointing, short = ActivationCheckpointingConfig(policy="every-layer"), Slice(1, 64)
    activations = Activations(config, bf16=False)
    compiled, uncompiled = (activations.layer("sliding", checkpointing, short, False, way) for way in (True, False))
    assert (uncompiled.gradients, compiled.gradients) == (0, 4 * parameters)
    assert uncompiled.backward < weights < compiled.backward < 1.5 * weights


def test_too_long_trace_is_planned_as_uncompiled(monkeypatch):
    monkeypatch.setattr(graphs, "MOST_NODES", 10)
    assert part(model(), "none") == part(model(), "none", compiled=False)


def test_accumulated_gradients_are_counted_once():
    """In the last layer's backward phase, an earlier micro-batch adds exactly all its gradients in ZeRO-0."""
    config = ModelConfig(width=512, heads=2, ffn=2048, block=64, depth=1, vocab_size=2, mixer="sliding", ssm={})
    activations, found = Activations(config, bf16=False), []
    for accumulation in (1, 2):
        work = Work(
            Strategy("zero0", 0),
            1,
            Slice(1, 64),
            accumulation,
            ActivationCheckpointingConfig(policy="every-layer"),
            1,
            compiled=True,
        )
        step = _Step(activations.sizes, config.mixers(), activations, work)
        found.append(next(phase for phase in step.phases() if phase.phase == "backward of layer 0"))
    once, again = found
    part = activations.layer("sliding", work.checkpointing, work.slice, False, compiled=True)
    sizes = activations.sizes
    assert once.gradients + part.gradients == 4 * (sizes.rest + sizes.head + sizes.of_layer(0)) + 4 * sizes.embedding
    assert again.gradients - once.gradients >= part.gradients
