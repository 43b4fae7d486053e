"""Muon under ZeRO, on any number of ranks, equals torch's Muon and AdamW in one process on the same gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bst_base.errors import UserError
from bst_dist.checkpoint.fragments import EngineState, placed
from bst_dist.config import load_recipe
from bst_dist.model.config import ModelConfig
from bst_dist.model.layers import MIXERS
from bst_dist.model.lm import LanguageModel
from bst_dist.parallel.ranks import Ranks
from bst_dist.plan.memory.zero import Sizes, muon_load
from bst_dist.train.config import OptimizerConfig
from bst_dist.train.deepspeed_json import DeepSpeedConfigError, Intent, complete
from bst_dist.train.engine import Engine
from bst_dist.train.optimizer import build_for

CONFIG = OptimizerConfig(kind="muon", learning_rate=2e-3, ssm_learning_rate=1e-3, weight_decay=3.0, momentum=0.9)
CLIPPING = 0.05
"""Far below the gradient norms, so that wrong clipping is noticed."""
STEPS = 4


def model() -> LanguageModel:
    """Return a model with matrices of several shapes: stacked ones, and one with three dimensions."""
    torch.manual_seed(0)
    return LanguageModel(
        ModelConfig(
            width=16,
            heads=4,
            ffn=40,
            block=8,
            depth=2,
            vocab_size=29,
            mixer="bst",
            activation="swiglu",
            attention={"kv_heads": 2},
            ssm={"state": 4, "chunk": 4},
            tied=False,
        )
    )


def batch(step: int) -> Tensor:
    return torch.randint(29, (2, 16), generator=torch.Generator().manual_seed(step))


def reference(monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Tensor], list[float]]:
    """Return the weights after all steps and each step's gradient norm, with torch's two optimizers.

    Stacked matrices are split into one matrix per map. torch's Muon orthogonalises in bf16; here it does so in fp32, as
    our Muon on a CPU.
    """
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    own = model()
    hidden = own.hidden_matrices()
    maps = [nn.Parameter(one.detach().clone()) for weight, stack in hidden for one in stack.maps(weight)]
    groups, left = own.parameter_groups(), {id(weight) for weight, _ in hidden}
    adam = []
    for name, members in groups.items():
        members = [one for one in members if id(one) not in left]
        rate = CONFIG.ssm_learning_rate if name == "ssm" else CONFIG.learning_rate
        decay = CONFIG.weight_decay if name == "matrices" else 0.0
        adam.append({"params": members, "lr": rate, "weight_decay": decay})
    optimizers = [
        torch.optim.Muon(
            maps,
            lr=CONFIG.learning_rate,
            weight_decay=CONFIG.weight_decay,
            momentum=CONFIG.momentum,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(adam, betas=(CONFIG.beta1, CONFIG.beta2), eps=CONFIG.eps),
    ]
    norms = []
    for step in range(STEPS):
        own.zero_grad()
        (own(batch(step), batch(step)).total / 32).backward()
        norms.append(float(nn.utils.clip_grad_norm_(own.parameters(), CLIPPING)))
        places = iter(maps)
        for weight, stack in hidden:
            for gradient in stack.maps(weight.grad):
                next(places).grad = gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
        places = iter(maps)
        with torch.no_grad():
            for weight, stack in hidden:
                for one in stack.maps(weight):
                    one.copy_(next(places))
    return {name: weight.detach().clone() for name, weight in own.named_parameters()}, norms


def engine_of(ranks: Ranks, stage: int, of: LanguageModel | None = None) -> Engine:
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    intent = Intent(ranks.world, 2, 1, CLIPPING, "fp32", "muon")
    return Engine(of or model(), CONFIG, complete({"zero_optimization": zero}, intent, "here"))


def take(engine: Engine, ids: Tensor, scale: float = 1.0) -> float:
    engine.set_rates(1.0)
    engine.accumulate(engine.forward(ids, ids).total * scale / 32, last=True)
    return engine.update()


def weights(engine: Engine) -> dict[str, Tensor]:
    from deepspeed.utils import safe_get_full_fp32_param

    whole = safe_get_full_fp32_param if engine.stage else (lambda parameter: parameter.detach())
    return {name: whole(parameter).clone() for name, parameter in engine.module.named_parameters()}


@pytest.mark.ranks
@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_stage_equals_muon_and_adamw_of_torch(on_ranks, monkeypatch, world):
    """Compares weights after several steps, and the norms used for clipping. On 2 and 3 ranks, matrices are cut."""
    expected, norms = reference(monkeypatch)
    monkeypatch.undo()

    def run(ranks: Ranks) -> list[tuple[list[float], dict[str, Any]]]:
        found = []
        for stage in range(4):
            engine = engine_of(ranks, stage)
            own_norms = [take(engine, batch(step)) for step in range(STEPS)]
            found.append((own_norms, {name: weight.numpy() for name, weight in weights(engine).items()}))
            engine.deepspeed.destroy()
        return found

    for own_norms, own in on_ranks(world, run)[-1]:
        assert own_norms == pytest.approx(norms, rel=1e-5)
        for name, wanted in expected.items():
            assert float((torch.from_numpy(own[name]) - wanted).abs().max()) < 1e-6, name


def values(state: EngineState) -> dict[str, Tensor]:
    return {f"{one.piece.name}/{kind}": tensor.clone() for one in state.held() for kind, tensor in one.values.items()}


@pytest.mark.ranks
def test_a_step_without_finite_gradients_changes_neither_weights_nor_momentum(on_ranks):
    def run(ranks: Ranks) -> None:
        for stage in range(4):
            engine = engine_of(ranks, stage)
            state = EngineState(engine.deepspeed)
            assert math.isfinite(take(engine, batch(0)))
            before = values(state)
            assert not math.isfinite(take(engine, batch(1), scale=math.inf))
            after = values(state)
            assert before.keys() == after.keys()
            assert all(torch.equal(before[name], after[name]) for name in before)
            assert state.updates() == 1
            take(engine, batch(1))
            assert state.updates() == 2
            assert not any(torch.equal(tensor, after[name]) for name, tensor in values(state).items() if "up" in name)
            engine.deepspeed.destroy()

    on_ranks(2, run)


@pytest.mark.ranks
def test_only_the_first_moment_of_hidden_matrices_is_kept(on_ranks):
    """Also: the layout that each rank computes matches what it holds, and the bytes sent match the plan."""
    own = model()
    hidden = {id(weight) for weight, _ in own.hidden_matrices()}
    names = {name for name, weight in own.named_parameters() if id(weight) in hidden}

    def run(ranks: Ranks) -> None:
        for stage in range(4):
            engine = engine_of(ranks, stage)
            ranks.phases.take()
            take(engine, batch(0))
            sent = ranks.phases.take()[1].get("all-to-all", 0)
            planned = 2 * muon_load(Sizes.of(own, muon=True), stage, ranks.world).sent  # fp32
            assert max(ranks.all_gather_object(sent)) == planned
            state = EngineState(engine.deepspeed)
            assert state.moments() == dict.fromkeys(names, 1)
            held = {one.piece.name: one for one in state.held()}
            assert {name for name, one in held.items() if "exp_avg_sq" not in one.values} == names & held.keys()
            for one in placed(engine.deepspeed) if stage else ():
                name = state._names[id(one.parameter)]
                begin, count = one.division.run(ranks.rank)
                assert count == (held[name].piece.count if name in held else 0)
                if count:
                    assert begin == held[name].piece.begin
                    assert one.tensor.view(-1)[one.offset :].data_ptr() == held[name].values["weight"].data_ptr()
            engine.deepspeed.destroy()

    on_ranks(3, run)


@pytest.mark.parametrize("section", ["offload_optimizer", "offload_param"])
def test_muon_with_offloading_is_refused_and_names_the_key(section):
    strategy = {"zero_optimization": {"stage": 3, section: {"device": "cpu"}}}
    with pytest.raises(
        DeepSpeedConfigError, match=rf"^here: zero_optimization\.{section}: optimizer.kind muon .*adamw$"
    ):
        complete(strategy, Intent(1, 1, 1, 1.0, "fp32", "muon"), "here")
    complete(strategy, Intent(1, 1, 1, 1.0, "fp32"), "here")
    none = {"zero_optimization": {"stage": 3, section: {"device": "none"}}}
    complete(none, Intent(1, 1, 1, 1.0, "fp32", "muon"), "here")


def test_a_momentum_setting_for_adamw_is_refused():
    with pytest.raises(ValueError, match="only muon has one"):
        OptimizerConfig(momentum=0.9)


def test_muon_with_completep_is_refused(recipe_file):
    overrides = ["optimizer.kind=muon", "model.parametrisation={kind: completep, base_width: 16, base_depth: 2}"]
    with pytest.raises(UserError, match="CompleteP's rates are derived for AdamW"):
        load_recipe(recipe_file(), overrides)


def test_hyena_filter_matrices_stay_with_adamw():
    """They are matrices with weight decay, but not linear maps between activations inside a layer."""
    sizes = {"width": 16, "heads": 2, "ffn": 32, "block": 8, "depth": 2, "vocab_size": 29, "mixer": "bst"}
    own = LanguageModel(ModelConfig(**sizes, ssm={"kernel": "hyena", "length": 16, "hidden": 8}))
    filters = [weight for name, weight in own.named_parameters() if ".ssm.layers." in name and name.endswith("weight")]
    filters += [weight for name, weight in own.named_parameters() if name.endswith("ssm.last")]
    optimizer = build_for(own, CONFIG)
    groups = {group["name"]: group for group in optimizer.param_groups}
    assert {*map(id, groups["other matrices"]["params"])} == {*map(id, filters)} != set()
    assert groups["other matrices"]["weight_decay"] == groups["matrices"]["weight_decay"] == CONFIG.weight_decay
    assert [name for name, group in groups.items() if "momentum" in group] == ["matrices"]
    assert sum(len(group["params"]) for group in groups.values()) == len(list(own.parameters()))


@pytest.mark.parametrize("mixer", MIXERS)
def test_the_maps_of_a_weight_cover_it_exactly_once(mixer):
    sizes = {"width": 64, "heads": 2, "ffn": 96, "block": 8, "depth": 1, "vocab_size": 29}
    own = LanguageModel(ModelConfig(**sizes, mixer=mixer))
    for weight, stack in own.hidden_matrices():
        marked = torch.zeros_like(weight)
        for one in stack.maps(marked):
            assert one.ndim == 2
            one += 1
        assert torch.equal(marked, torch.ones_like(weight))
        assert stack.shapes(weight.shape) == [tuple(one.shape) for one in stack.maps(marked)]
