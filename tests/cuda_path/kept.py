"""What a compiled layer keeps between its passes, counted on fake tensors beside what `bst plan` counts.

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

from bst_dist.activation import selective
from bst_dist.activation.config import ActivationCheckpointingConfig
from bst_dist.config import load_recipe
from bst_dist.model import attention, flex
from bst_dist.model.config import ModelConfig
from bst_dist.model.lm import LanguageModel
from bst_dist.parallel.past import Past
from bst_dist.plan.activations import Activations, Slice

KEEPS = {"none": None, "selective": selective.keeps}


def planned(model: ModelConfig, mixer: str, policy: str, rows: int, length: int) -> int:
    """Bytes of a layer under autocast that are kept for the backward pass, by the plan."""
    checkpointing = ActivationCheckpointingConfig(policy=policy)
    return Activations(model, bf16=True).layer(mixer, checkpointing, Slice(rows, length), zero3=False).kept


def kept_by_graph(model: ModelConfig, mixer: str, policy: str, rows: int, length: int) -> int:
    """The same of a compiled layer: what torch's partitioner leaves of its graph, without parameters and without what
    all layers share."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(attention, "attention_path", lambda _: "flex"))
        stack.enter_context(patch.object(torch_flex, "_validate_device", lambda *_: None))
        stack.enter_context(patch.object(flex, "BACKEND", "aot_eager"))
        stack.enter_context(FakeTensorMode())
        one = {"depth": 1, "mixer": mixer, "placement": "all", "vocab_size": 1}
        layer, past, kept = LanguageModel(model.model_copy(update=one)).layers[0], Past(), {}
        layer.compiled = True
        x = torch.empty(rows, length, model.width, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16), saved_tensors_hooks(lambda y: kept.setdefault(_place(y), y), id):
            layer(x, past, None, KEEPS[policy])
        shared = [y for y in tree_iter(past.shared) if isinstance(y, Tensor)]
        for one in (*layer.parameters(), *shared):
            kept.pop(_place(one), None)
        return sum(y.untyped_storage().nbytes() for y in kept.values())


def _place(x: Tensor) -> int:
    return x.untyped_storage()._cdata


if __name__ == "__main__":
    recipe = load_recipe(sys.argv[1])
    for mixer in dict.fromkeys(recipe.model.mixers()):
        for policy in KEEPS:
            of = (recipe.model, mixer, policy, 1, recipe.train.sequence_length)
            print(f"{mixer}, {policy}: planned {planned(*of) / 1e6:.1f} MB, compiled {kept_by_graph(*of) / 1e6:.1f} MB")
