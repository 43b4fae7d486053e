"""Models that read more than a block of the past, on ranks that share a sequence; and layouts that are refused."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from bst_dist.model.config import ModelConfig
from bst_dist.model.lm import LanguageModel
from bst_dist.parallel.mesh import Mesh
from bst_dist.parallel.sequence.neighbour import LeftNeighbour, SequenceParallelError

BLOCK, LENGTH, VOCABULARY = 8, 64, 23
PASSED_ON = {
    "transformer-xl": {"mixer": "transformer-xl", "transformer_xl": {"window": 2 * BLOCK}},
    "SH hyena": {"mixer": "bst", "ssm": {"kernel": "hyena", "length": 20, "hidden": 8}},
    "MH explicit": {"mixer": "bst", "context": {"variant": "MH"}, "ssm": {"kernel": "explicit", "length": 33}},
    "MF explicit": {"mixer": "bst", "context": {"variant": "MF"}, "ssm": {"kernel": "explicit", "length": 20}},
    "filter longer than a slice": {"mixer": "ssm", "ssm": {"kernel": "explicit", "length": 40}},
    "mamba2": {"mixer": "mamba2", "mamba2": {"state": 3, "head": 8, "chunk": 4}},
    "SH ssd": {"mixer": "bst", "ssm": {"kernel": "ssd", "state": 3, "head": 2, "chunk": 4}},
    "no SSM": {"mixer": "bst", "ssm": {"kernel": "none"}},
    "SH joint": {"mixer": "bst-joint", "ssm": {"state": 4, "chunk": 4}},
    "MF joint": {"mixer": "bst-joint", "context": {"variant": "MF", "states": 3}, "ssm": {"state": 4, "chunk": 4}},
    "MF joint, RoPE": {
        "mixer": "bst-joint",
        "context": {"variant": "MF", "states": 3},
        "ssm": {"state": 4, "chunk": 4},
        "attention": {"position": "rope"},
    },
}
REFUSED = {
    "gated-deltanet": ({"mixer": "gated-deltanet", "gated_deltanet": {"chunk": 4}}, "parallel.sp to 1"),
    "block-recurrent": ({"mixer": "block-recurrent", "block_recurrent": {"states": 4}}, "parallel.sp to 1"),
    "s4-dplr": ({"mixer": "bst", "ssm": {"kernel": "s4-dplr", "state": 4}}, "parallel.sp to 1"),
    "full": ({"mixer": "full"}, "Lower parallel.sp"),
    "filter longer than a slice, of channels that do not divide": (
        {"mixer": "bst", "context": {"ssm_width": 3}, "ssm": {"kernel": "explicit", "length": 40}},
        "choose a parallel.sp that divides them",
    ),
}


def build(settings) -> LanguageModel:
    torch.manual_seed(0)
    shared = {"width": 16, "heads": 2, "ffn": 16, "block": BLOCK, "depth": 2, "vocab_size": VOCABULARY}
    return LanguageModel(ModelConfig(**shared, **settings)).double()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(VOCABULARY, (2, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    return ids[:, :-1], ids[:, 1:]


def loss_and_gradients(model, ids, labels, past=None) -> torch.Tensor:
    """Return one vector: the loss, then all gradients."""
    out = model(ids, labels, past=past)
    gradients = torch.autograd.grad(out.total, list(model.parameters()), allow_unused=True)
    flat = [
        g.flatten() if g is not None else torch.zeros(p.numel(), dtype=torch.float64)
        for g, p in zip(gradients, model.parameters(), strict=True)
    ]
    return torch.cat([out.total.detach().view(1), *flat])


@pytest.mark.ranks
def test_two_ranks_per_sequence_equal_one_rank(on_ranks):
    models = {name: build(settings) for name, settings in PASSED_ON.items()}
    expected = {name: loss_and_gradients(model, *batch()) for name, model in models.items()}

    def errors() -> dict[str, float]:
        group, found = Mesh(2, dist.get_rank(), 2).sp_group(), {}
        for name, model in models.items():
            ids, labels = (x.chunk(2, dim=1)[group.rank] for x in batch())
            summed = loss_and_gradients(model, ids, labels, LeftNeighbour(group, LENGTH // 2))
            dist.all_reduce(summed)
            found[name] = float((summed - expected[name]).norm() / expected[name].norm())
        return found

    for found in on_ranks(2, errors):
        assert max(found.values()) < 1e-10, found


@pytest.mark.ranks
def test_unsupported_layers_are_refused_with_the_setting_to_change(on_ranks):
    def messages() -> dict[str, str]:
        group, found = Mesh(2, dist.get_rank(), 2).sp_group(), {}
        for name, (settings, _) in REFUSED.items():
            ids, labels = (x.chunk(2, dim=1)[group.rank] for x in batch())
            with pytest.raises(SequenceParallelError) as error:
                build(settings)(ids, labels, past=LeftNeighbour(group, LENGTH // 2))
            found[name] = str(error.value)
            dist.barrier()
        return found

    for found in on_ranks(2, messages):
        for name, (_, message) in REFUSED.items():
            assert message in found[name], name
