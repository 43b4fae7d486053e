"""Count the bytes that a compiled layer keeps between its passes, on fake tensors, and compare with `bst plan`.

python -m tests.cuda_path.kept launch/recipes/bst-1.3b.yaml
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from unittest.mock import patch

import torch
import torch.nn.attention.flex_attention as torch_flex
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_iter

from bst_dist.activation.config import ActivationCheckpointingConfig
from bst_dist.activation.policy import policy as checkpointing
from bst_dist.config import load_recipe
from bst_dist.model.attention import flex, sliding
from bst_dist.model.config import ModelConfig
from bst_dist.model.document_mask import Borders, Starts
from bst_dist.model.lm import LanguageModel
from bst_dist.parallel.sequence.past import Past
from bst_dist.plan.memory.activations import Activations
from bst_dist.plan.memory.parts import Slice
from bst_dist.plan.rehearse import no_borders

POLICIES = ("none", "selective")


def planned(
    model: ModelConfig,
    mixer: str,
    policy: str,
    rows: int,
    length: int,
    documents: str = "joined",
    compiled: bool = True,
) -> int:
    """Return the planned bytes that a layer keeps for the backward pass under autocast."""
    checkpointing = ActivationCheckpointingConfig(policy=policy)
    activations = Activations(model, bf16=True, documents=documents)
    return activations.layer(mixer, checkpointing, Slice(rows, length), zero3=False, compiled=compiled).kept


def kept_by_graph(
    model: ModelConfig, mixer: str, policy: str, rows: int, length: int, documents: str = "joined"
) -> int:
    """Return the same for a compiled layer: the bytes of all tensors that autograd saves.

    Parameters, and tensors that all layers share, are not counted. If the whole layer is recomputed, the saved tensor
    is its input.
    """
    with ExitStack() as stack:
        stack.enter_context(patch.object(sliding, "attention_path", lambda _: "flex"))
        stack.enter_context(patch.object(torch_flex, "_validate_device", lambda *_: None))
        stack.enter_context(patch.object(flex, "BACKEND", "aot_eager"))
        stack.enter_context(FakeTensorMode())
        one = {"depth": 1, "mixer": mixer, "placement": "all", "vocab_size": 1}
        layer, past, kept = LanguageModel(model.model_copy(update=one)).layers[0], Past(), {}
        layer.compiled = True
        x = torch.empty(rows, length, model.width, requires_grad=True)
        starts = no_borders(documents, rows, length, model.block)
        checkpoint = checkpointing(ActivationCheckpointingConfig(policy=policy), [layer])
        with torch.autocast("cpu", torch.bfloat16), saved_tensors_hooks(lambda y: kept.setdefault(_place(y), y), id):
            checkpoint(layer, x, past, starts) if checkpoint else layer(x, past, starts)
        shared = [y for y in tree_iter(past.shared) if isinstance(y, Tensor)]
        for one in (*layer.parameters(), *shared, *_tensors(starts)):
            kept.pop(_place(one), None)
        return sum(y.untyped_storage().nbytes() for y in kept.values())


def _tensors(starts: Starts | None) -> list[Tensor]:
    found = vars(starts).values() if isinstance(starts, Borders) else [starts]
    return [one for one in found if isinstance(one, Tensor)]


def _place(x: Tensor) -> int:
    return x.untyped_storage()._cdata


if __name__ == "__main__":
    recipe = load_recipe(sys.argv[1])
    for mixer in dict.fromkeys(recipe.model.mixers()):
        for policy in POLICIES:
            of = (recipe.model, mixer, policy, 1, recipe.train.sequence_length)
            before, now = planned(*of, compiled=False), planned(*of)
            print(
                f"{mixer}, {policy}: uncompiled {before / 1e6:.1f} MB, compiled by the plan {now / 1e6:.1f} MB, "
                f"compiled {kept_by_graph(*of) / 1e6:.1f} MB"
            )
