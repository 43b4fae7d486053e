"""Small versions of all models of the project, with blocks that are whole tiles."""

from __future__ import annotations

import torch
from torch import Tensor

from bst_dist.model.lm import LanguageModel, ModelConfig

BLOCK, LENGTH, VOCABULARY = 128, 256, 29

MODELS = {
    "sliding T5": {"mixer": "sliding"},
    "sliding RoPE": {"mixer": "sliding", "attention": {"position": "rope"}},
    "without self": {"mixer": "sliding", "attention": {"include_self": False}},
    "SH": {"mixer": "bst", "context": {"variant": "SH"}},
    "SH RoPE": {"mixer": "bst", "context": {"variant": "SH"}, "attention": {"position": "rope"}},
    "SH shared keys": {"mixer": "bst", "context": {"variant": "SH"}, "attention": {"kv_heads": 1}},
    "SH previous": {"mixer": "bst", "context": {"variant": "SH", "attend": "previous"}},
    "MH": {"mixer": "bst", "context": {"variant": "MH"}},
    "MF": {"mixer": "bst", "context": {"variant": "MF", "states": 3}},
    "without cross": {"mixer": "bst-no-cross"},
    "SH joint": {"mixer": "bst-joint"},
    "SH joint RoPE shared keys": {"mixer": "bst-joint", "attention": {"position": "rope", "kv_heads": 1}},
    "MF joint": {"mixer": "bst-joint", "context": {"variant": "MF", "states": 3}},
    "SH hyena": {"mixer": "bst", "ssm": {"kernel": "hyena", "length": LENGTH}},
    "MF explicit": {
        "mixer": "bst",
        "context": {"variant": "MF", "states": 3},
        "ssm": {"kernel": "explicit", "length": LENGTH},
    },
    "SH DPLR": {"mixer": "bst", "ssm": {"kernel": "s4-dplr"}},
    "SH SSD": {"mixer": "bst", "ssm": {"kernel": "ssd", "head": 4}},
    "Transformer-XL": {"mixer": "transformer-xl", "transformer_xl": {"window": 256}},
    "Block-Recurrent": {"mixer": "block-recurrent", "block_recurrent": {"states": 8}},
    "GSS": {"mixer": "gss"},
    "pure SSM": {"mixer": "ssm"},
    "Mamba-2": {"mixer": "mamba2", "mamba2": {"head": 16}},
    "Gated DeltaNet": {"mixer": "gated-deltanet"},
    "full T5": {"mixer": "full", "full": {"longest": 1024}},
    "full RoPE shared keys": {
        "mixer": "full",
        "full": {"longest": 1024},
        "attention": {"position": "rope", "kv_heads": 1},
    },
    "full RoPE": {"mixer": "full", "full": {"longest": 1024}, "attention": {"position": "rope"}},
}


def build(name: str, **changes: object) -> LanguageModel:
    """Build a model of two layers: a sliding layer, then one of the named kind."""
    torch.manual_seed(0)
    settings = {
        "width": 32,
        "heads": 2,
        "ffn": 64,
        "block": BLOCK,
        "depth": 2,
        "placement": [1],
        "vocab_size": VOCABULARY,
    }
    model = LanguageModel(ModelConfig(**settings | MODELS[name] | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def tokens(length: int = LENGTH, rows: int = 2) -> tuple[Tensor, Tensor]:
    """Return random input ids and labels, (rows, length) each."""
    drawn = torch.randint(0, VOCABULARY, (rows, length + 1), generator=torch.Generator().manual_seed(1))
    return drawn[:, :-1], drawn[:, 1:]
