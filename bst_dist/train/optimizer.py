"""AdamW with three parameter groups: matrices, vectors, and the dynamics of the state space models.

Weight decay acts on matrices only. The dynamics (log_dt, A) have a rate of their own and no decay, which is the
practice of the S4 family (Gu et al., arXiv 2206.11893): decay would pull every channel towards one time scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import nn

from data_pipeline.config import Config

# What a group's update depends on beside its gradients. The learning rate is among them only through `peak_rate`.
HYPERPARAMETERS = ("lr", "betas", "eps", "weight_decay")


class OptimizerConfig(Config):
    learning_rate: float = Field(1e-3, gt=0)
    """Peak rate of matrices and vectors."""
    ssm_learning_rate: float = Field(1e-3, gt=0, le=1e-3)
    """Peak rate of the SSM dynamics, which are trained at 1e-3 or less whatever the rest uses."""
    weight_decay: float = Field(0.1, ge=0)
    """Decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101), on matrices only."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = Field(0.95, ge=0, lt=1)
    """Decay of the second moment."""
    eps: float = Field(1e-8, gt=0)
    """Added to the root of the second moment."""


def build(config: OptimizerConfig, groups: Mapping[str, Sequence[nn.Parameter]]) -> torch.optim.AdamW:
    """AdamW over the model's groups ``{"matrices", "vectors", "ssm"}``; empty groups are left out.

    torch's own AdamW and not a subclass: ZeRO accepts it untested-flag free and nothing is compiled at start.
    """
    peak = {"matrices": config.learning_rate, "vectors": config.learning_rate, "ssm": config.ssm_learning_rate}
    decay = {"matrices": config.weight_decay, "vectors": 0.0, "ssm": 0.0}
    described = [
        {"name": name, "params": list(groups[name]), "lr": peak[name], "weight_decay": decay[name]}
        for name in peak
        if groups.get(name)
    ]
    return torch.optim.AdamW(described, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


class Groups:
    """The hyperparameters the run wants in each parameter group, put there before every step.

    The engine's checkpoint loading may leave other values in the groups (ZeRO-3's universal loading copies those of
    group 0 to all), so the recipe and never the loaded optimizer is their source.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.names = [group["name"] for group in optimizer.param_groups]
        self.wanted = [{key: group[key] for key in HYPERPARAMETERS} for group in optimizer.param_groups]

    def apply(self, optimizer: Any, factor: float) -> dict[str, float]:
        """Set every group's hyperparameters, its rate scaled by `factor`; returns the rates by group name.

        `optimizer` is whatever the engine made of the one the groups were read from: the same groups in the same order.
        """
        rates = {}
        for name, wanted, group in zip(self.names, self.wanted, optimizer.param_groups, strict=True):
            group.update(wanted, lr=wanted["lr"] * factor)
            rates[name] = group["lr"]
        return rates

    def describe(self) -> dict[str, dict[str, Any]]:
        """Group name -> its hyperparameters at the peak rate, for the checkpoint's manifest."""
        return dict(zip(self.names, self.wanted, strict=True))
