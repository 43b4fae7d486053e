"""Plans of training in slices: edges have the bytes that layers leave, and memory is that of one slice."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from bst_base.settings import dump, parse
from bst_dist.cli import main
from bst_dist.config import Recipe
from bst_dist.model.config import ModelConfig
from bst_dist.model.lm import LanguageModel
from bst_dist.plan import slices
from bst_dist.plan.accelerators import accelerator
from bst_dist.plan.memory.activations import Activations
from bst_dist.plan.search import GATHERED_ONCE, HEADROOM, Choice, Planner
from bst_dist.plan.slices import Size, best, sizes
from bst_dist.plan.speed import Cluster
from bst_dist.plan.traffic import GATHER, SCATTER
from bst_dist.report.utilisation import edge_flops_per_token

MODEL = {
    "width": 64,
    "heads": 4,
    "ffn": 256,
    "block": 32,
    "depth": 2,
    "vocab_size": 100,
    "mixer": "bst",
    "placement": [1],
    "ssm": {"state": 8, "chunk": 16},
}


def recipe(**train) -> Recipe:
    given = {"steps": 10, "sequence_length": 256, "sequences": 1, **train}
    return parse(Recipe, {"name": "small", "model": MODEL, "data": {"corpus": "none"}, "train": given})


def planner(gpus: int = 1, **train) -> Planner:
    return Planner(recipe(**train), Cluster(1, gpus, accelerator("h100-80gb", None)))


@pytest.fixture(scope="module")
def found() -> list[Size]:
    return sizes(planner()).planned


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"context": {"variant": "MF", "states": 3}},
        {"mixer": "block-recurrent", "block_recurrent": {"states": 5}},
        {"mixer": "ssm"},
        {"mixer": "transformer-xl", "transformer_xl": {"window": 64}},
        {"ssm": {"kernel": "hyena", "length": 100}},
    ],
)
def test_planned_edge_bytes_equal_the_carried_state(changes):
    settings = {name: value for name, value in (MODEL | changes).items() if name != "ssm" or "ssm" in changes}
    config = parse(ModelConfig, settings)
    left = LanguageModel(config).carry()
    with torch.no_grad():
        LanguageModel(config).hidden(torch.zeros(2, 128, dtype=torch.long), None, left)
    assert Activations(config, bf16=False).edge(2) == sum(value.nbytes for value in left.after.values())


@pytest.mark.parametrize(
    ("gpus", "length", "slices"), [(1, 32, [1]), (1, 64, [1]), (1, 128, [1, 2]), (4, 128, [1]), (4, 512, [1, 2])]
)
def test_the_whole_sequence_is_always_planned_and_slices_keep_two_blocks_per_rank(gpus, length, slices):
    assert [size.slices for size in sizes(planner(gpus, sequence_length=length)).planned] == slices


def test_smaller_slices_need_less_memory_except_edges(found):
    assert [size.slices for size in found] == [1, 2, 4]
    assert [size.edges_bytes for size in found] == [(size.slices - 1) * planner().activations.edge(1) for size in found]
    on_disk = [size.by_place["disk"].needed for size in found[1:]]
    assert on_disk == sorted(on_disk, reverse=True)
    assert on_disk[0] < found[0].by_place["device"].needed
    last = found[-1].by_place
    assert last["device"].memory.total - last["disk"].memory.total == found[-1].edges_bytes
    assert last["host"].memory.host == found[-1].edges_bytes


def test_sequences_are_not_sliced_if_memory_is_sufficient(found):
    size, place = best(found)
    assert (size.slices, place) == (1, "device")


def test_slices_add_one_forward_pass_and_zero_traffic_per_stage():
    whole, cut = (planner(2, sequences=2).candidate(Choice(1, 1, 1, "none", slices)) for slices in (1, 4))
    assert cut.speed.compute == pytest.approx(whole.speed.compute)
    head = 1 - planner().flops["head"] / sum(planner().flops.values())
    assert cut.speed.rerun == pytest.approx(whole.speed.compute / 3 * head * 3 / 4, rel=0.1)
    sent = {
        stage: [
            sum(planner(2, sequences=2).candidate(Choice(stage, 1, 1, "none", slices)).traffic.values())
            for slices in (1, 4)
        ]
        for stage in range(1, 4)
    }
    assert sent[1][0] == sent[1][1]  # reduced once per step
    assert sent[2][1] > 2 * sent[2][0]
    assert sent[3][1] > 2 * sent[3][0]  # gathered in every pass; small parameters are kept whole


def test_weights_gathered_once_are_sent_once_for_any_slices():
    def sent(stage: int | str, slices: int) -> tuple[float, float]:
        traffic = planner(2, sequences=2).candidate(Choice(stage, 1, 1, "none", slices)).traffic
        return traffic[GATHER], traffic[SCATTER]

    weights = 4 * planner().sizes.total / 2
    assert [sent(GATHERED_ONCE, slices) for slices in (1, 4)] == [(weights, weights), (weights, 4 * weights)]
    assert sent(3, 4)[1] == 4 * weights


def test_keeping_every_fourth_edge_saves_memory_and_adds_passes():
    ways = [
        planner().candidate(Choice(0, 1, 1, "none", 8, place, every))
        for place in ("device", "disk")
        for every in (1, 4)
    ]
    edge = planner().activations.edge(1)
    assert ways[0].memory.total - ways[1].memory.total == edge * (7 - (1 + 3))
    assert ways[3].memory.total - ways[2].memory.total == edge * 3  # all edges between two kept ones are on the device
    assert [way.work.edge_passes for way in ways] == [7, 10, 7, 10]
    assert ways[1].speed.rerun == pytest.approx(ways[0].speed.rerun * 10 / 7)


def test_plan_shows_slices_if_only_they_fit(found):
    """The device's memory is just enough for slices with edges on disk.

    Layers are not compiled, because a compiled layer would fit even with a whole sequence.
    """
    limit = found[-1].by_place["disk"].needed / (1 - HEADROOM) + 1
    small = accelerator("h100-80gb", None).model_copy(update={"memory_gb": limit / 1e9})
    tight = Planner(recipe().model_copy(update={"compile": False}), Cluster(1, 1, small))
    shown = slices.where_they_help(tight, tight.candidate(Choice(0, 1, 1, "none")))
    assert [size.slices for size in shown.planned] == [1, 2, 4]
    assert best(shown.planned)[0].slices == 4
    roomy = planner()
    assert slices.where_they_help(roomy, roomy.best()) is None
    assert len(slices.where_they_help(roomy, roomy.candidate(Choice(0, 1, 1, "none", 2))).planned) == 3


@pytest.mark.parametrize(
    ("model", "train", "planned", "refused"),
    [
        ({"mixer": "full", "placement": "all"}, {}, [1], {128: "full attention", 64: "full attention"}),
        ({"mixer": "full"}, {}, [1], {128: "full attention", 64: "full attention"}),
        ({"mixer": "transformer-xl", "transformer_xl": {"window": 128}}, {}, [1, 2], {64: "cuts a segment"}),
        ({}, {"edges_every": 2, "slice_tokens": 64}, [1, 4], {128: "edges_every 2 is not below the 2 slices"}),
        ({}, {"length_changes": [{"step": 5, "sequence_length": 192}]}, [1, 4], {128: "must be a multiple"}),
    ],
)
def test_sizes_that_training_refuses_are_not_planned(model, train, planned, refused):
    data = recipe(**train).model_dump() | {"model": MODEL | model}
    run = parse(Recipe, data)
    found = sizes(Planner(run.of_one_length(run.train.longest), Cluster(1, 1, accelerator("h100-80gb", None))), run)
    assert [size.slices for size in found.planned] == planned
    assert list(found.refused) == list(refused)
    for tokens, said in refused.items():
        assert said in found.refused[tokens]
    for tokens in (size.tokens for size in found.planned if size.slices > 1):
        parse(Recipe, data | {"train": data["train"] | {"slice_tokens": tokens}})


def test_slices_shorter_than_a_layer_s_reach_are_not_planned_for_several_ranks():
    """A filter of 100 inputs, 16 channels for 3 ranks: a rank's share of a slice must have 99 tokens."""
    model = MODEL | {"ssm": {"kernel": "explicit", "length": 100}}
    run = parse(Recipe, recipe(sequence_length=768).model_dump() | {"model": model})
    found = sizes(Planner(run, Cluster(1, 3, accelerator("h100-80gb", None))))
    assert [size.tokens for size in found.planned] == [768, 384]
    assert "99 positions back" in found.refused[192]


def test_full_attention_and_refused_shapes_have_a_longest_sequence_without_slices(monkeypatch):
    monkeypatch.setattr(slices, "SHARE", 128)
    monkeypatch.setattr(slices, "LONGEST", 1024)
    one, two = (Cluster(1, count, accelerator("h100-80gb", None)) for count in (1, 2))

    def longest(cluster, **changes):
        return slices.longest(
            parse(Recipe, recipe(sequence_length=384).model_dump() | {"model": MODEL | changes}), cluster, 1e9
        )

    full = longest(one, mixer="full", full={"longest": 384})
    assert full.at_once > 384
    assert full.way is None
    assert full.refused.startswith("slices: train.slice_tokens: full attention")
    assert "parallel.sp" in longest(two, mixer="full").refused
    odd = longest(one, block=48, ssm={"chunk": 16})
    assert odd.slice_tokens % 48 == 0 < odd.at_once
    segments = longest(one, mixer="transformer-xl", transformer_xl={"window": 3 * 32})
    assert segments.slice_tokens % (3 * 32) == 0 < segments.slice_tokens


def test_edge_flops_equal_layer_forward_flops_except_the_last_slice():
    config = parse(ModelConfig, MODEL)
    layers = sum(planner().flops.values()) - planner().flops["head"]
    assert edge_flops_per_token(config, 256, 1) == 0
    assert edge_flops_per_token(config, 256, 4) == pytest.approx(layers * 3 / 4)


def test_longest_sequence_is_limited_by_memory_for_edges(monkeypatch):
    """A device of 10,000,000 bytes, 100 bytes per token, edges of 1,000 bytes, and a host with 5,000,000 bytes."""

    def way(recipe, cluster, length, policy, slices=1, edges="device"):
        return SimpleNamespace(fits=length // slices <= 100_000, excess=100 * (length // slices) - 10_000_000)

    monkeypatch.setattr(slices, "_shared", way)
    cluster = Cluster(1, 1, accelerator("h100-80gb", None))
    monkeypatch.setattr(Activations, "edge", lambda self, rows: 1000)
    found = slices.longest(recipe(), cluster, 5_000_000)
    assert found.at_once == 65_536
    assert found.slice_tokens == 65_536
    assert found.in_slices == {"device": 65_536 * (3_446_400 // 1000 + 1), "host": 65_536 * 5001}


def test_slices_command_prints_tables_and_settings(tmp_path, capsys, monkeypatch):
    path, report = tmp_path / "small.yaml", tmp_path / "report.json"
    path.write_text(dump(recipe()))
    assert main(["plan", str(path), "--slices", "--gpus-per-node", "1", "--json", str(report)]) == 0
    assert len(json.loads(report.read_text())["sizes"]) == 3
    assert "best: deepspeed=zero0" in capsys.readouterr().out
    refusing = ["model.mixer=full", "--gpus-per-node", "1", "--json", str(report)]
    assert main(["plan", str(path), "--slices", *refusing]) == 0
    printed = capsys.readouterr().out
    assert "not planned: slices of 128, 64 tokens. slices of 128 tokens: train.slice_tokens: full attention" in printed
    assert "slice_tokens" not in printed.split("best:")[1]
    written = json.loads(report.read_text())
    assert [size["slices"] for size in written["sizes"]] == [1]
    assert [size["slice_tokens"] for size in written["refused_sizes"]] == [128, 64]
    monkeypatch.setattr(slices, "SHARE", 128)
    monkeypatch.setattr(slices, "LONGEST", 1024)
    assert main(["plan", str(path), "--longest", "1", *refusing]) == 0
    assert "refused: slices: train.slice_tokens: full attention" in capsys.readouterr().out
    assert main(["plan", str(path), "--slices", "--nodes", "1,2"]) == 2
    assert "--slices needs one value of --nodes" in capsys.readouterr().err
