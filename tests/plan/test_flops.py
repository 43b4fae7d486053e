"""Analytic FLOP counts compared with torch's counter, which counts every matmul of the plain attention path."""

from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bst_dist.model.attention import fused_tiles
from bst_dist.model.attention.flex_mask import TILE, Band, visited_tiles
from bst_dist.model.attention.window import Window
from bst_dist.model.config import ModelConfig
from bst_dist.model.lm import LanguageModel
from bst_dist.plan import flops
from bst_dist.plan.flops import forward_flops

DOC = Path(__file__).parents[2] / "docs" / "sweeps.md"


def config(mixer, variant, **context):
    return ModelConfig(
        width=64,
        heads=4,
        ffn=128,
        block=32,
        depth=2,
        mixer=mixer,
        placement=[1],
        vocab_size=50,
        context={"variant": variant, "states": 4, **context},
        ssm={"state": 8, "chunk": 16},
    )


@pytest.mark.usefixtures("plain_attention")
@pytest.mark.parametrize("case", [("sliding", "SH"), ("bst", "SH"), ("bst", "MH"), ("bst", "MF")])
def test_forward_flops_equal_those_of_the_torch_counter(case):
    model, length, rows = LanguageModel(config(*case)), 128, 64
    ids = torch.zeros(rows, length, dtype=torch.long)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(ids, ids)
    counted = counter.get_total_flops() / ids.numel()
    expected = sum(forward_flops(model.config, length).values())
    assert counted == pytest.approx(expected, rel=2e-3)  # the tables of the SSM, amortised over the batch


def test_each_kind_of_layer_and_each_window_is_counted_once(monkeypatch):
    """A sequence of 2^24 tokens has 131,072 tiles: counting them for every layer took seconds."""
    counted, tiles = [], flops.sliding_tiles
    monkeypatch.setattr(flops, "sliding_tiles", lambda *sizes: counted.append(sizes) or tiles(*sizes))
    flops._scored_in_windows.cache_clear()
    deep = config("bst", "SH").model_copy(update={"depth": 8, "placement": [1, 3]})
    found = [forward_flops(deep, 4096) for _ in range(2)]
    assert counted == [(4096, 0, 32)]
    layers = [flops.layer_flops(deep, mixer, 4096) for mixer in deep.mixers()]
    assert found[0] == found[1]
    for term in set().union(*layers):
        assert found[0][term] == sum(layer.get(term, 0) for layer in layers)


def documented() -> list[list[float]]:
    """Return the rows of the table of docs/sweeps.md: window, tokens, and keys per query four times."""
    table = DOC.read_text().split("### What is counted for attention")[1].split("\n## ")[0]
    rows = [line.split("|")[1:-1] for line in table.splitlines() if line.startswith("| ")][2:]
    return [[float(cell.replace(",", "")) for cell in row] for row in rows]


def computed_by_the_cpu_kernel(window: int, length: int) -> float:
    """Return the keys per query in the calls of torch's kernel."""
    pairs, attend = [], fused_tiles._attend

    def counting(q, k, *rest, **options):
        pairs.append(q.shape[0] * q.shape[2] * k.shape[2])
        return attend(q, k, *rest, **options)

    q, tile = torch.zeros(1, length, 1, 8), fused_tiles.fused_tile(window)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_tiles, "_attend", counting)
        fused_tiles.fused_sliding_attention(q, q, q, torch.zeros(1, tile, window + tile), None, 1)
    return sum(pairs) / length


@pytest.mark.parametrize("row", documented(), ids=lambda row: f"{row[0]:.0f}, {row[1]:.0f}")
def test_documented_keys_per_query_are_those_seen_counted_and_computed(row):
    window, length = int(row[0]), int(row[1])
    sliding = ModelConfig(width=8, heads=1, ffn=8, block=window, depth=1, mixer="sliding", vocab_size=2)
    visited = visited_tiles(Band(length, length, Window(window)), "cpu")
    expected = [
        sum(min(window, query + 1) for query in range(length)) / length,
        forward_flops(sliding, length)["attention"] / (4 * 8),
        computed_by_the_cpu_kernel(window, length),
        sum(counts.sum().item() for counts in (visited[0], visited[2])) * TILE**2 / length,
    ]
    assert row[2:] == pytest.approx(expected, abs=0.05)
