"""FLOPs of every mixer and kernel compared with torch's counter, which counts all matmuls of plain attention."""

import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bst_dist.model.attention.tiles import QUERY_TILE
from bst_dist.model.config import ModelConfig
from bst_dist.model.lm import LanguageModel
from bst_dist.plan.flops import forward_flops

pytestmark = pytest.mark.usefixtures("plain_attention")

LENGTH, BLOCK = 256, 64
KERNELS = {
    "s4d": {"state": 8, "chunk": 16},
    "s4-dplr": {"kernel": "s4-dplr", "state": 8, "chunk": 16},
    "explicit": {"kernel": "explicit", "length": 150},
    "hyena": {"kernel": "hyena", "length": 256, "hidden": 8},
    "none": {"kernel": "none"},
    "ssd": {"kernel": "ssd", "state": 6, "head": 4, "chunk": 16},
}
CASES = {
    **{
        f"{v} {k}": {"mixer": "bst", "context": {"variant": v, "states": 4}, "ssm": s}
        for v in ("SH", "MH", "MF")
        for k, s in KERNELS.items()
        if (v, k) != ("MF", "ssd")
    },
    **{f"ssm {k}": {"mixer": "ssm", "ssm": s} for k, s in KERNELS.items()},
    "sliding": {"mixer": "sliding"},
    "no cross": {"mixer": "bst-no-cross"},
    "SH joint": {"mixer": "bst-joint"},
    "MH joint": {"mixer": "bst-joint", "context": {"variant": "MH"}},
    "MF joint": {"mixer": "bst-joint", "context": {"variant": "MF", "states": 4}},
    "transformer-xl": {"mixer": "transformer-xl", "transformer_xl": {"window": 128}},
    "transformer-xl, last segment shorter": {"mixer": "transformer-xl", "transformer_xl": {"window": 192}},
    "block-recurrent": {"mixer": "block-recurrent", "block_recurrent": {"states": 24}},
    "gss": {"mixer": "gss", "ssm": {"state": 32, "chunk": 16}, "gss": {"gate": 3, "reduce": 2}},
    "mamba2": {"mixer": "mamba2", "mamba2": {"state": 5, "head": 16, "chunk": 16}},
    "gated-deltanet": {"mixer": "gated-deltanet", "gated_deltanet": {"chunk": 16}},
    "full": {"mixer": "full"},
    "sliding, with a gate": {"mixer": "sliding", "activation": "swiglu"},
}
CASES |= {
    f"{name}, wide heads": {**CASES[name], "head_width": 12}
    for name in (
        "SH s4d",
        "MH s4d",
        "MF s4d",
        "SH joint",
        "sliding",
        "no cross",
        "transformer-xl",
        "block-recurrent",
        "gated-deltanet",
        "full",
    )
}


CASES |= {
    f"{name}, shared keys": {**CASES[name], "attention": {"kv_heads": 2}}
    for name in ("SH s4d", "sliding", "transformer-xl", "block-recurrent", "full")
}


def counted(model, rows):
    ids = torch.zeros(rows, LENGTH, dtype=torch.long)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(ids, ids)
    return counter.get_total_flops()


def build(settings):
    shared = {"width": 32, "heads": 4, "ffn": 48, "block": BLOCK, "depth": 3, "placement": [0, 2], "vocab_size": 50}
    return LanguageModel(ModelConfig(**shared | settings)).requires_grad_(False)


@pytest.mark.parametrize("name", CASES)
def test_flops_terms_equal_the_cost_of_one_more_sequence(name):
    """Tables and filters are made once per batch, so the difference between two batch sizes leaves them out.

    FFTs, which the counter does not know, have their own term.
    """
    model = build(CASES[name])
    found = counted(model, 3) - counted(model, 2)
    terms = forward_flops(model.config, LENGTH)
    assert found / LENGTH == pytest.approx(sum(terms.values()) - terms.get("fft", 0), rel=1e-9)


def test_fused_full_attention_counts_causal_tiles_only():
    fused, tiled = (build({"mixer": "full", "attention": {"position": p}}) for p in ("rope", "t5"))
    terms = forward_flops(fused.config, LENGTH)
    assert terms == forward_flops(tiled.config, LENGTH)
    more = counted(fused, 3) - counted(fused, 2) - (counted(tiled, 3) - counted(tiled, 2))
    hidden = 2 * 4 * 32 * (LENGTH - QUERY_TILE) / 2  # what the plain path of two layers computes beyond the tiles
    assert more / LENGTH == pytest.approx(hidden, rel=1e-9)


@pytest.mark.parametrize("taps", [150, 256, 4096])
def test_fft_size_equals_that_of_the_layers_transforms(taps, monkeypatch):
    """Also for filters that are longer than the sequence, of which the layer uses as many taps as there are tokens."""
    sizes, rfft = set(), torch.fft.rfft
    monkeypatch.setattr(torch.fft, "rfft", lambda x, n: sizes.add(n) or rfft(x, n=n))
    model = build({"mixer": "ssm", "ssm": {"kernel": "explicit", "length": taps}, "placement": [0]})
    ids = torch.zeros(1, LENGTH, dtype=torch.long)
    model(ids, ids)
    (size,) = sizes
    transforms = 2.5 * size * math.log2(size) * 2  # of each channel, to frequencies and back
    found = forward_flops(model.config, LENGTH)["fft"]
    assert found * LENGTH == pytest.approx((transforms + 3 * size) * 32)
