"""AdamW, or Muon with AdamW, over the model's parameter groups: matrices, vectors and the dynamics of the SSMs.

CompleteP adds two more groups (bst_dist/model/parametrisation.py), whose hyperparameters depend on width and depth.

Weight decay acts on matrices only. The dynamics (log_dt, A) have a separate learning rate and no decay, as is usual in
the S4 family (Gu et al., arXiv 2206.11893): decay would pull every channel towards one time scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from bst_dist.model.lm import LanguageModel
from bst_dist.model.parametrisation import Scale
from bst_dist.model.roles import Stack
from bst_dist.train.config import OptimizerConfig
from bst_dist.train.muon import MOMENTUM, Muon

# The keys of a parameter group that are set before every step. "lr" is the peak rate; `Groups.apply` scales it.
HYPERPARAMETERS = ("lr", "betas", "eps", "weight_decay", MOMENTUM)
DECAYED = ("matrices", "filters", "other matrices")


def build(
    config: OptimizerConfig,
    groups: Mapping[str, Sequence[nn.Parameter]],
    scales: Mapping[str, Scale] | None = None,
    hidden: Sequence[tuple[nn.Parameter, Stack]] = (),
) -> torch.optim.AdamW:
    """Build the optimizer over the model's groups ``{"matrices", "vectors", "ssm", ...}``; empty groups are left out.

    `scales`: factors of a group's rate, decay and eps; 1 if missing. `hidden`: the matrices that Muon updates (the
    whole group "matrices"), with the maps in them. Without Muon this is torch's AdamW itself, not a subclass: ZeRO
    accepts it without its flag for untested optimizers, and nothing is compiled at the start.
    """
    described = []
    for name, parameters in groups.items():
        scale = (scales or {}).get(name, Scale())
        rate = config.ssm_learning_rate if name == "ssm" else config.learning_rate
        decay = config.weight_decay if name in DECAYED else 0.0
        if parameters:
            described.append(
                {
                    "name": name,
                    "params": list(parameters),
                    "lr": rate * scale.rate,
                    "weight_decay": decay * scale.decay,
                    "eps": config.eps * scale.eps,
                }
            )
    defaults = {"betas": (config.beta1, config.beta2), "eps": config.eps, "fused": True}
    if config.kind == "adamw":
        return torch.optim.AdamW(described, **defaults)
    for group in described:
        if group["name"] == "matrices":
            group[MOMENTUM] = config.momentum
    return Muon(described, dict(hidden), **defaults)


def build_for(model: LanguageModel, config: OptimizerConfig) -> torch.optim.AdamW:
    """Build the optimizer of a model's parameters."""
    muon = config.kind == "muon"
    hidden = model.hidden_matrices() if muon else ()
    return build(config, model.parameter_groups(hidden_apart=muon), model.group_scales(), hidden)


class Groups:
    """The hyperparameters of each parameter group, set again before every step.

    They always come from the recipe, never from a loaded optimizer: DeepSpeed's checkpoint loading may leave other
    values in the groups (ZeRO-3's universal loading copies those of group 0 to all).
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.names = [group["name"] for group in optimizer.param_groups]
        self.wanted = [{key: group[key] for key in HYPERPARAMETERS if key in group} for group in optimizer.param_groups]

    def apply(self, optimizer: Any, factor: float) -> dict[str, float]:
        """Set every group's hyperparameters, its rate scaled by `factor`; return the rates by group name.

        `optimizer`: the engine's wrapper of the original optimizer, with the same groups in the same order.
        """
        rates = {}
        for name, wanted, group in zip(self.names, self.wanted, optimizer.param_groups, strict=True):
            group.update(wanted, lr=wanted["lr"] * factor)
            rates[name] = group["lr"]
        return rates

    def describe(self) -> dict[str, dict[str, Any]]:
        """Return group name -> hyperparameters at the peak rate, for the checkpoint manifest."""
        return dict(zip(self.names, self.wanted, strict=True))
