"""An untrained model predicts an almost uniform distribution, at any width."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from bst_dist.model.config import ModelConfig
from bst_dist.model.lm import LanguageModel

VOCABULARY, BLOCK, LENGTH = 8192, 32, 64
MODELS: dict[str, dict[str, Any]] = {
    "sliding": {"mixer": "sliding"},
    "RoPE": {"mixer": "sliding", "attention": {"position": "rope"}},
    "SH": {"mixer": "bst"},
    "MH": {"mixer": "bst", "context": {"variant": "MH"}},
    "MF": {"mixer": "bst", "context": {"variant": "MF", "states": 4}},
    "SH hyena": {"mixer": "bst", "ssm": {"kernel": "hyena", "length": LENGTH}},
    "SH ssd": {"mixer": "bst", "ssm": {"kernel": "ssd"}},
    "without cross": {"mixer": "bst-no-cross"},
    "SH joint": {"mixer": "bst-joint"},
    "MF joint": {"mixer": "bst-joint", "context": {"variant": "MF", "states": 4}},
    "Transformer-XL": {"mixer": "transformer-xl", "transformer_xl": {"window": LENGTH}},
    "Block-Recurrent": {"mixer": "block-recurrent", "block_recurrent": {"states": BLOCK}},
    "GSS": {"mixer": "gss"},
    "pure SSM": {"mixer": "ssm"},
    "Mamba-2": {"mixer": "mamba2"},
    "Gated DeltaNet": {"mixer": "gated-deltanet"},
    "full": {"mixer": "full"},
    "SH untied": {"mixer": "bst", "tied": False},
    **{f"SH {name}": {"mixer": "bst", "activation": name} for name in ("relu2", "gelu", "swiglu")},
}


@torch.no_grad()
def initial_loss(width: int, **settings: Any) -> float:
    """Return the mean loss in nats of an untrained model on independent random tokens."""
    torch.manual_seed(0)
    sizes = {"width": width, "heads": width // 32, "ffn": 2 * width, "block": BLOCK, "depth": 2}
    model = LanguageModel(ModelConfig(**sizes, vocab_size=VOCABULARY, **settings))
    drawn = torch.randint(VOCABULARY, (2, LENGTH + 1))
    return float(model(drawn[:, :-1], drawn[:, 1:]).total) / (2 * LENGTH)


@pytest.mark.parametrize("width", [64, 256, 1024])
@pytest.mark.parametrize("name", MODELS)
def test_initial_loss_equals_a_uniform_guess_at_any_width(name: str, width: int) -> None:
    assert initial_loss(width, **MODELS[name]) == pytest.approx(math.log(VOCABULARY), rel=0.05)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("width", [64, 256, 1024])
@pytest.mark.parametrize("base", [64, 256])
def test_initial_loss_equals_a_uniform_guess_under_completep(width: int, base: int, tied: bool) -> None:
    parametrisation = {"kind": "completep", "base_width": base, "base_depth": 1}
    assert initial_loss(width, mixer="bst", tied=tied, parametrisation=parametrisation) == pytest.approx(
        math.log(VOCABULARY), rel=0.1
    )
