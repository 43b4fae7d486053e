"""Known pitfalls of DeepSpeed that must not happen here. docs/verify.md lists them, each with its test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bst_dist.model.config import MIXER_SECTIONS, ModelConfig
from bst_dist.model.layers import MIXERS
from bst_dist.model.lm import LanguageModel
from bst_dist.model.roles import products_only
from bst_dist.model.ssm.s4d import S4D
from bst_dist.parallel.ranks import Ranks
from bst_dist.parallel.sequence.neighbour import LeftNeighbour
from bst_dist.parallel.sequence.rehearsal import Rehearsal
from bst_dist.train import building
from bst_dist.train.config import OptimizerConfig
from bst_dist.train.deepspeed_json import DeepSpeedConfigError, Intent, complete, read
from bst_dist.train.engine import Engine
from bst_dist.train.start.request import Request, load, resolve

KERNELS: list[dict[str, Any]] = [
    {"kernel": "s4d"},
    {"kernel": "s4-dplr"},
    {"kernel": "explicit", "length": 16},
    {"kernel": "hyena", "length": 16},
]


def model(**sections: Any) -> LanguageModel:
    torch.manual_seed(0)
    sizes = {"width": 16, "heads": 2, "ffn": 32, "block": 8, "depth": 2, "vocab_size": 29}
    return LanguageModel(ModelConfig(**(sizes | {"mixer": "bst"} | sections)))


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel["kernel"])
@pytest.mark.parametrize("variant", ["SH", "MH", "MF"])
def test_no_parameter_is_complex(variant, kernel):
    own = model(context={"variant": variant, "states": 3}, ssm=kernel)
    assert [name for name, parameter in own.named_parameters() if parameter.is_complex()] == []


@pytest.mark.parametrize("mixer", MIXERS)
def test_no_parameter_of_any_layer_is_complex(mixer):
    assert not any(parameter.is_complex() for parameter in model(mixer=mixer, width=64).parameters())


def test_a_complex_parameter_is_refused_by_name_before_zero_sees_it():
    own = model()
    own.layers[1].mixer.poles = torch.nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    completed = complete({}, Intent(1, 1, 1, 1.0, "fp32"), "here")
    with pytest.raises(DeepSpeedConfigError, match=r"layers\.1\.mixer\.poles is complex"):
        Engine(own, OptimizerConfig(), completed)


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"activation_checkpointing": {"partition_activations": True}}, "set by the recipe"),
        ({"activation_checkpointing": {"cpu_checkpointing": True}}, "set by the recipe"),
        ({"bf16": {"enabled": True}}, "casts every parameter"),
        ({"sequence_parallel_size": 2}, "unknown key 'sequence_parallel_size'"),
        ({"flops_profiler": {"enabled": True}}, "unknown key 'flops_profiler'"),
        ({"checkpoint": {"load_universal": True}}, "unknown key 'checkpoint'"),
        ({"zero_optimization": {"stage": 3, "mics_shard_size": 8}}, "unknown key 'zero_optimization.mics_shard_size'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_sections_with_silent_side_effects_are_refused(tmp_path, section, said):
    path = tmp_path / "strategy.json"
    path.write_text(json.dumps(section))
    with pytest.raises(DeepSpeedConfigError) as error:
        complete(read(path), Intent(2, 1, 1, 1.0, "bf16"), str(path))
    assert said in str(error.value)


def test_offloading_to_a_missing_drive_is_refused_with_the_key():
    path = Path(__file__).parents[2] / "ds_configs" / "zero3_nvme_offload.json"
    strategy = json.loads(path.read_text())
    strategy["zero_optimization"]["offload_param"]["nvme_path"] = "/no/such/drive"
    completed = complete(strategy, Intent(1, 1, 1, 1.0, "bf16"), str(path))
    with pytest.raises(DeepSpeedConfigError, match=r"nvme_path: .* has no directory"):
        Engine(model(), OptimizerConfig(), completed)


class Recorder(Rehearsal):
    """A rehearsal that records every exchange, in order."""

    def __init__(self, rank: int, size: int):
        super().__init__(rank, size)
        self.made: list[tuple[str, str]] = []

    def gather(self, x: torch.Tensor, kind: str) -> Any:
        self.made.append(("gather", kind))
        return super().gather(x, kind)

    def shift(self, x: torch.Tensor, kind: str, to_left: bool = False, around: bool = False) -> Any:
        self.made.append((f"shift to_left={to_left}", kind))
        finish = super().shift(x, kind, to_left, around)

        def finite() -> torch.Tensor | None:
            came = finish()
            return None if came is None else came.zero_()

        return finite


@pytest.mark.parametrize("isolated", [False, True])
@pytest.mark.parametrize("variant", ["SH", "MH", "MF"])
def test_all_ranks_run_the_same_exchanges_in_the_same_order(variant, isolated):
    """Also the first rank of a sequence, and a rank where every block begins a document: they do not use the past."""

    def exchanges(rank: int, starts_everywhere: bool) -> list[tuple[str, str]]:
        group, own = Recorder(rank, 4), model(context={"variant": variant, "states": 3})
        ids = torch.randint(0, 29, (2, 16))
        starts = torch.full((2, 2), starts_everywhere) if isolated else None
        own(ids, ids, starts=starts, past=LeftNeighbour(group, 16)).total.backward()
        return group.made

    cases = [exchanges(rank, everywhere) for rank in (0, 1, 3) for everywhere in (False, True)]
    assert len(cases[0]) >= 6
    assert any("gradient" in kind for _, kind in cases[0])
    assert all(case == cases[0] for case in cases)


@pytest.mark.ranks
@pytest.mark.usefixtures("unmeasured")
def test_dynamics_stay_in_single_precision_under_bf16_in_every_stage(recipe_file, tmp_path, on_ranks):
    """Also after a step. The SSM computes in fp32; its inputs are in bf16."""
    recipe = recipe_file(train={"precision": "bf16", "micro_sequences": 2})

    def dtypes(ranks: Ranks) -> list[set[str]]:
        found = []
        for stage in range(4):
            request = Request(recipe, [f"deepspeed=ds_configs/zero{stage}.json"], tmp_path / "none", False, None)
            start = resolve(load(request), request, ranks.world)
            engine, seen = building.build_engine(start, ranks), set()
            for module in engine.module.modules():
                if isinstance(module, S4D):
                    module.register_forward_hook(
                        lambda _, given, made, seen=seen: seen.add(f"{given[0].dtype} to {made.dtype}")
                    )
            ids = torch.randint(0, 29, (1, 32))
            engine.set_rates(1.0)
            for last in (True, True):
                engine.accumulate(engine.forward(ids, ids).total, last=last)
                engine.update()
            seen |= {str(parameter.dtype) for parameter in engine.module.parameters()}
            optimizer = engine.deepspeed.optimizer
            seen |= {str(p.dtype) for group in optimizer.param_groups for p in group["params"]}
            found.append(seen)
            engine.deepspeed.destroy()
        return found

    assert on_ranks(2, dtypes)[0] == [{"torch.float32", "torch.bfloat16 to torch.float32"}] * 4


@pytest.mark.parametrize(("mixer", "kernel"), [*((one, "s4d") for one in MIXERS), ("bst", "hyena"), ("bst", "ssd")])
def test_weights_gathered_in_bf16_are_rounded_before_any_use(mixer, kernel):
    """So rounding these weights first leaves the loss and all gradients bitwise equal, in any layer."""
    ssm = {"hyena": {"length": 16}, "ssd": {"head": 8}}.get(kernel, {}) | {"kernel": kernel}
    sections = {"ssm": ssm} if "ssm" in MIXER_SECTIONS[mixer] else {}
    own = model(mixer=mixer, width=64, tied=False, **sections)
    ids = torch.randint(0, 29, (2, 16), generator=torch.Generator().manual_seed(1))

    def run() -> list[torch.Tensor]:
        own.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            total = own(ids, ids).total
        total.backward()
        return [total.detach(), *(p.grad for p in own.parameters() if p.grad is not None)]

    before, rounded = run(), 0
    for module in own.modules():
        for parameter in products_only(module):
            parameter.data = parameter.data.bfloat16().float()
            rounded += parameter.numel()
    assert rounded > sum(p.numel() for layer in own.layers for p in layer.ffn.parameters()) + own.output.weight.numel()
    assert all(torch.equal(a, b) for a, b in zip(run(), before, strict=True))


@pytest.mark.ranks
@pytest.mark.usefixtures("unmeasured")
def test_gradient_clipping_uses_the_global_norm_in_every_stage(recipe_file, tmp_path, on_ranks):
    """A norm wrong by a factor of sp or dp would clip wrongly; two stages would differ, and AdamW would hide it."""
    recipe = recipe_file(train={"gradient_clipping": 0.01, "micro_sequences": 4}, parallel={"sp": 2})

    def norms(ranks: Ranks) -> list[tuple[float, float]]:
        found = []
        for stage in range(4):
            request = Request(recipe, [f"deepspeed=ds_configs/zero{stage}.json"], tmp_path / "none", False, None)
            start = resolve(load(request), request, ranks.world)
            engine = building.build_engine(start, ranks)
            ids = torch.arange(32)[None] % 29
            engine.set_rates(1.0)
            engine.accumulate(engine.forward(ids, ids).total / 32, last=True)
            before = engine.update()
            moments = [state["exp_avg"] for state in engine.deepspeed.optimizer.state.values() if "exp_avg" in state]
            (total,) = ranks.all_reduce_numbers([float(sum(m.double().pow(2).sum() for m in moments))])
            found.append((before, (total / (ranks.world if stage == 0 else 1)) ** 0.5))
            engine.deepspeed.destroy()
        return found

    found = on_ranks(2, norms)[0]
    for before, moment in found:
        assert before == pytest.approx(found[0][0], rel=1e-5)
        assert moment == pytest.approx(0.1 * 0.01, rel=1e-3)  # (1 - beta1) of the clipped gradient
