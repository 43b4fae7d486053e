"""Performance reports: times add up, bytes have known values, and the slowest rank is found."""

from __future__ import annotations

import gzip
import json
import math
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._higher_order_ops.flex_attention import flex_attention
from torch.utils.flop_counter import FlopCounterMode

from bst_base.json_lines import read_lines
from bst_dist.activation import policy as activation
from bst_dist.activation import selective
from bst_dist.activation.config import ActivationCheckpointingConfig
from bst_dist.config import load_recipe
from bst_dist.model.config import ModelConfig
from bst_dist.model.lm import LanguageModel
from bst_dist.parallel.phases import Phases
from bst_dist.plan.flops import MIXER_TERMS, forward_flops
from bst_dist.plan.rehearse import rehearse
from bst_dist.report.metrics import FILE, StepReport, Writer
from bst_dist.report.performance import NamedNumbers, Performance, summarise
from bst_dist.report.profiling import DIRECTORY
from bst_dist.report.utilisation import Utilisation, recomputed_flops_per_token
from bst_dist.tools.bench.lockstep import World
from bst_dist.train.run import train
from bst_dist.train.start.request import Request

STEP = StepReport(10, 100, 1.0, 0.5, 1.0, 1e-3, 1e-3, 2.0, 50.0, 0.5)
CONFIG = ModelConfig(
    width=32,
    heads=2,
    ffn=64,
    block=16,
    depth=4,
    vocab_size=50,
    mixer="bst",
    placement=[1, 3],
    ssm={"state": 4, "chunk": 8},
)


class Clock:
    """Replacement for time.perf_counter that the test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)


def test_time_is_assigned_to_phases_and_communication(monkeypatch):
    clock = Clock(monkeypatch)
    phases = Phases()
    phases.enter("forward", step=3)
    clock.now = 1.0
    with phases.exchanging("all-gather", sent_bytes=10):
        clock.now = 5.0
    clock.now = 7.0
    phases.enter("backward")
    clock.now = 8.0
    with phases.exchanging("all-gather", sent_bytes=5):
        pass
    assert phases.take() == ({"start": 0.0, "forward": 3.0, "communication": 4.0, "backward": 1.0}, {"all-gather": 15})
    assert phases.take() == ({"backward": 0.0}, {})
    assert (phases.step, phases.name, phases.exchange, phases.exchanges) == (3, "backward", "all-gather", 2)


def test_accelerator_is_synchronised_only_in_measured_steps(monkeypatch):
    clock, waits = Clock(monkeypatch), []
    phases = Phases(lambda: waits.append(clock.now))
    phases.enter("forward", 1)
    clock.now = 5.0
    assert (phases.take(), waits) == (({}, {}), [])
    phases.measure(True)
    clock.now = 6.0
    phases.enter("backward")
    phases.measure(False)
    clock.now = 9.0
    phases.enter("data")
    assert phases.take()[0] == {"forward": 1.0}
    assert waits == [5.0, 6.0]


def test_occasional_phases_are_measured_in_all_steps_and_with_their_communication(monkeypatch):
    clock, waits = Clock(monkeypatch), []
    phases = Phases(lambda: waits.append(clock.now))
    for name in ("forward", "evaluate", "evaluate", "data"):  # each evaluated batch enters again
        phases.enter(name, 1)
        clock.now += 1.0
        with phases.exchanging("all-reduce"):
            clock.now += 0.5
    phases.enter("checkpoint")
    clock.now += 4.0
    phases.enter("data")
    assert phases.take()[0] == {"evaluate": 3.0, "checkpoint": 4.0}
    assert set(waits) == {1.5, 2.5, 3.0, 4.0, 4.5, 6.0, 10.0}


@pytest.mark.parametrize("accelerator", [False, True])
def test_evaluations_are_divided_among_all_steps(monkeypatch, accelerator):
    """100 steps of 2 ms and two evaluations of 0.2 s, one of them in a step that an accelerator does not measure."""
    clock, found = Clock(monkeypatch), []

    def on_rank(ranks: Any) -> None:
        ranks.phases = phases = Phases((lambda: None) if accelerator else None)
        ranks.memory_high_water = lambda: 0
        writer = Writer()
        writer.write = lambda report: found.append(report.seconds)
        performance = Performance(100, ranks, [writer], None)
        for step in range(1, 101):
            phases.enter("forward", step)
            clock.now += 0.002
            if step in (50, 100):
                phases.enter("evaluate", step)
                clock.now += 0.2
            phases.enter("report")
            performance.after_step(replace(STEP, step=step), last=step == 100)

    World(1).run(on_rank)
    spent = {phase: seconds for phase, seconds in found[0].items() if seconds}
    assert spent == pytest.approx({"forward": 0.002, "evaluate": 0.004})


def test_slowest_rank_is_found_from_time_without_communication():
    names = ["seconds forward", "seconds communication", "seconds backward", "sent all-reduce", "memory"]
    table = torch.tensor([[1.0, 3.0, 0.0, 5, 5], [3.0, 0.0, 1.0, 9, 9], [1.0, 9.0, 0.0, 7, 7]]).double()
    found = summarise(STEP, names, table, ["a", "b", "c"])
    assert (found.slowest_rank, found.slowest_host, found.slowest_ratio, found.work_s) == (1, "b", 4.0, 1.0)
    assert found.seconds == pytest.approx({"forward": 5 / 3, "communication": 4.0, "backward": 1 / 3})
    assert (found.memory_bytes, found.memory_rank, found.sent_bytes) == (9, 1, {"all-reduce": 9})


def test_ranks_exchange_only_numbers_after_the_names_are_known():
    """One rank sometimes has numbers that no other has, for example because only it writes; another lacks a number."""
    given = [{"a": 1.0, "b": 2.0}, {"b": 3.0, "a": 4.0}, {"a": 5.0, **{f"only here {n}": float(n) for n in range(60)}}]

    def on_rank(ranks: Any) -> list[Any]:
        numbers, found = NamedNumbers(ranks), []
        for own in (
            {"a": 0.5},
            given[ranks.rank],
            given[ranks.rank],
            {"b": float(ranks.rank)},
            {"late": 7.0} if ranks.rank == 1 else {},
        ):
            before = ranks.counts.collectives
            names, table = numbers.exchange(own)
            found.append((list(names), table.tolist(), ranks.counts.collectives - before))
        return found

    results, _ = World(3).run(on_rank)
    assert results[0] == results[1] == results[2]
    first, second, third, fourth, fifth = results[0]
    assert first == (["a"], [[0.5]] * 3, 3)  # three collectives: numbers, names, numbers
    names, table, collectives = second
    assert [dict(zip(names, row, strict=True)) for row in table] == [
        {name: own.get(name, 0.0) for name in names} for own in given
    ]
    assert sorted(names) == sorted(given[2] | given[0])
    assert collectives == 3
    assert third == (names, table, 1)
    assert fourth[2] == 1
    assert [row[names.index("b")] for row in fourth[1]] == [0.0, 1.0, 2.0]
    assert [row[fifth[0].index("late")] for row in fifth[1]] == [0.0, 7.0, 0.0]  # when there are more than ROOM names


@pytest.mark.parametrize(
    ("accelerator", "every", "wanted"),
    [
        (False, 10, list(range(10, 401, 10))),
        (True, 10, [10, 20, 100, 200, 300, 400]),
        (True, 30, [30, 60, 120, 240, 360]),
        (True, 1, [1, 2, 100, 200, 300, 400]),
        (True, 250, [250]),
    ],
)
def test_few_steps_are_measured_on_an_accelerator(accelerator, every, wanted):
    measured, reported = [], []

    def on_rank(ranks: Any) -> None:
        ranks.phases = Phases((lambda: None) if accelerator else None)
        writer = Writer()
        writer.write = lambda report: reported.append(report.step)
        ranks.memory_high_water = lambda: 0
        performance = Performance(every, ranks, [writer], None)
        for step in range(1, 401):
            if ranks.phases.measuring:
                measured.append(step)
            performance.after_step(replace(STEP, step=step), last=step == 400)

    World(1).run(on_rank)
    assert reported == wanted
    assert measured == (wanted if accelerator else list(range(1, 401)))


@pytest.mark.parametrize(("done", "measured"), [(99, True), (98, False), (0, False)])
def test_the_first_step_of_a_resumed_run_is_measured_if_it_is_reported(done, measured):
    phases = Phases(lambda: None)

    def on_rank(ranks: Any) -> None:
        ranks.phases = phases
        Performance(10, ranks, [], None, done)

    World(1).run(on_rank)
    assert phases.measuring is measured


SLIDING = CONFIG.model_copy(update={"depth": 2, "mixer": "sliding", "placement": (0, 1)})
"""A model of the layers 0 and 2, which every-kth-layer recomputes."""


@pytest.mark.parametrize(
    ("policy", "layers"), [("none", None), ("every-layer", CONFIG), ("every-kth-layer", SLIDING), ("offload", CONFIG)]
)
def test_recomputed_flops_equal_those_of_recomputed_layers(policy, layers):
    settings = ActivationCheckpointingConfig(policy=policy)
    again = recomputed_flops_per_token(CONFIG, 64, settings, "tiles", compiled=False)
    terms = forward_flops(layers, 64) if layers else {"head": 0}
    assert again == pytest.approx(sum(terms.values()) - terms["head"])
    utilisation = Utilisation(3e9, 1e12, again)
    assert utilisation.hfu(10.0) == pytest.approx(utilisation.mfu(10.0) + again * 10 / 1e12)


@pytest.mark.parametrize("peak", [math.nan, 1e9])
def test_utilisation_above_one_or_without_a_known_peak_is_nan(peak):
    assert math.isnan(Utilisation(3e9, peak).mfu(10.0))
    assert math.isnan(Utilisation(0.5e8, peak, 1e9).hfu(10.0))
    assert math.isnan(peak) or [Utilisation(flops, peak).mfu(10.0) for flops in (0.5e8, 1e8)] == [0.5, 1.0]


def counted(config: ModelConfig, settings: ActivationCheckpointingConfig) -> int:
    """Return the FLOPs of both passes over 128 tokens, without fused CPU kernels, which torch does not count."""
    torch.manual_seed(0)
    model = LanguageModel(config)
    model.checkpoint = activation.policy(settings, model.layers)
    ids = torch.randint(50, (2, 64))
    with FlopCounterMode(display=False) as counter:
        model(ids, ids, torch.ones_like(ids, dtype=torch.bool)).total.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("policy", ["every-layer", "every-kth-layer"])
def test_recomputed_flops_equal_those_counted_by_torch(policy):
    settings = ActivationCheckpointingConfig(policy=policy)
    more = counted(CONFIG, settings) - counted(CONFIG, ActivationCheckpointingConfig())
    again = recomputed_flops_per_token(CONFIG, 64, settings, "fused-tiles", compiled=False)
    for index in filter(settings.runs_again, range(CONFIG.depth)):
        terms = MIXER_TERMS[CONFIG.mixers()[index]](CONFIG, 64)
        again -= terms["attention"] + terms.get("cross", 0)
    assert more / 128 == pytest.approx(again, rel=0.02)


SELECTIVE = ActivationCheckpointingConfig(policy="selective")
MIXERS = {
    "SH": {},
    "MF": {"context": {"variant": "MF", "states": 3}},
    "joint": {"mixer": "bst-joint"},
    "MF joint": {"mixer": "bst-joint", "context": {"variant": "MF", "states": 3}},
    "block-recurrent": {"mixer": "block-recurrent", "block_recurrent": {"states": 12}},
    "gate": {"activation": "swiglu"},
}


def of(name: str) -> ModelConfig:
    return ModelConfig(**CONFIG.model_dump(exclude_unset=True) | {"activation": "gelu"} | MIXERS[name])


@pytest.mark.parametrize("merged", [False, True], ids=["single maps", "merged maps"])
@pytest.mark.parametrize("name", MIXERS)
def test_selective_recomputes_the_flops_counted_by_torch(name, merged, monkeypatch):
    """Attention of these layers is in kernels that the policy keeps and that torch's counter leaves out, except that to
    the states of a joint softmax.

    Also with the maps of one input in one product, as in a compiled layer: the product may be wider than its input.
    """
    config = of(name)
    monkeypatch.setattr("bst_dist.model.matmul.is_compiling", lambda: merged)
    more = counted(config, SELECTIVE) - counted(config, ActivationCheckpointingConfig())
    again = recomputed_flops_per_token(config, 64, SELECTIVE, "fused-tiles", compiled=merged)
    assert more / 128 == pytest.approx(again, rel=0.01)


def test_selective_keeps_flex_attention_on_cuda():
    config = of("SH")
    assert selective.keeps(flex_attention, ())
    on = {
        path: recomputed_flops_per_token(config, 256, SELECTIVE, path, compiled=True)
        for path in ("flex", "fused-tiles", "tiles")
    }
    terms = forward_flops(config, 256)
    assert on["flex"] == on["fused-tiles"] == pytest.approx(on["tiles"] - terms["attention"] - terms["cross"])
    short = recomputed_flops_per_token(config, 128, SELECTIVE, "flex", compiled=True)  # the window in plain operations
    kept = recomputed_flops_per_token(config, 128, SELECTIVE, "fused-tiles", compiled=True)
    assert short == pytest.approx(kept + forward_flops(config, 128)["attention"])


@pytest.mark.ranks
def test_run_reports_known_bytes_and_traces_a_window_of_steps(recipe_file, tmp_path, on_ranks, unmeasured):
    recipe = recipe_file(
        log={"every": 2, "profile": [2, 3]}, train={"steps": 4}, evaluation={"every": 0}, parallel={"sp": 2}
    )
    run = tmp_path / "run"

    def on_rank(ranks: Any) -> int:
        train(Request(recipe, [], run, False, None), ranks)
        return 0

    on_ranks(2, on_rank)
    reports = [line for line in read_lines(run / FILE) if line["kind"] == "performance"]
    assert [line["step"] for line in reports] == [2, 4]
    model = load_recipe(run / "recipe.yaml").model
    parameters = sum(p.numel() for p in LanguageModel(model).parameters())
    sent = reports[0]["sent_bytes"]  # ZeRO-1 on two ranks: all gradients, half of the weights
    assert sent["all-reduce"] == pytest.approx(4 * parameters, rel=0.01)
    assert sent["all-gather"] == pytest.approx(4 * parameters / 2, rel=0.05)
    between = rehearse(model, sp=2, rows=1, slice_length=16)
    assert {kind: sent[kind] for kind in between} == {kind: 4 * count for kind, count in between.items()}
    assert {"forward", "backward", "optimizer", "data", "communication"} <= reports[1]["seconds"].keys()
    assert reports[1]["memory_bytes"] > 2**20
    for rank in (0, 1):
        trace = json.loads(gzip.decompress((run / DIRECTORY / f"steps-2-3-rank-{rank:05d}.json.gz").read_bytes()))
        assert len(trace["traceEvents"]) > 100
