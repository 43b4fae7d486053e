"""The DeepSpeed engine: built from the recipe, held to it, and asked for one update at a time.

Everything that is peculiar to a ZeRO stage is in this file, in `weights` and in `snapshot`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bst_dist.checkpoint.fragments import placed
from bst_dist.model.roles import products_only
from bst_dist.parallel.loading import deepspeed
from bst_dist.train import deepspeed_json
from bst_dist.train.config import OptimizerConfig
from bst_dist.train.muon import Muon
from bst_dist.train.optimizer import Groups, build_for

deepspeed.runtime.zero.utils.ZERO_SUPPORTED_OPTIMIZERS.append(Muon)  # else DeepSpeed refuses it, or warns of it


class Engine:
    """A model in DeepSpeed's hands, with its optimizer and the parameter groups it must keep."""

    def __init__(self, model: nn.Module, optimizer: OptimizerConfig, completed: dict[str, Any]) -> None:
        """Hand `model` to DeepSpeed under the completed JSON.

        ZeRO runs over the whole world, with no model-parallel unit: sequence-parallel ranks are ordinary data-parallel
        ranks for it, because the loss is normalised by the tokens of the whole step. Raises DeepSpeedConfigError,
        naming the key, when the engine's parsed configuration is not what was asked for.
        """
        deepspeed_json.require_nvme(completed)
        _require_real(model)
        client = build_for(model, optimizer)
        self.groups = Groups(client)
        if compiled := {type(module) for module in model.modules() if getattr(module, "compiled", False)}:
            # ZeRO-3 then gathers what such a module needs before it runs, and nothing from within it. No other stage
            # reads this.
            deepspeed.utils.set_z3_leaf_modules(model, list(compiled))
        self.deepspeed, *_ = deepspeed.initialize(model=model, optimizer=client, config=completed)
        if found := deepspeed_json.differences(completed, self.deepspeed._config):
            raise deepspeed_json.DeepSpeedConfigError("\n".join(f"DeepSpeed did not take {line}" for line in found))
        if isinstance(client, Muon):
            # By DeepSpeed's backend, where what is sent is noted (`parallel/communication.py`).
            lying = placed(self.deepspeed) if self.stage else ()
            client.place(lying, torch.distributed.get_rank(), deepspeed.comm.all_to_all_single)
        if self.stage == 3 and completed["torch_autocast"]["enabled"]:
            _gather_in_bf16(self.deepspeed)

    @property
    def stage(self) -> int:
        """The ZeRO stage, 0 to 3."""
        return int(self.deepspeed.zero_optimization_stage())

    @property
    def module(self) -> nn.Module:
        """The model itself; under ZeRO-3 its parameters are empty outside of a pass."""
        return self.deepspeed.module

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """The model's forward pass, under autocast when the precision is bf16."""
        return self.deepspeed(*inputs, **named)

    @contextmanager
    def gathered(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        """While it is entered, these parameters are whole on every rank, under ZeRO-3 too; every rank must enter it."""
        with deepspeed.zero.GatheredParameters(parameters):
            yield

    def set_rates(self, factor: float) -> dict[str, float]:
        """Put every group's hyperparameters in place, rates scaled by `factor`; returns the rates by group."""
        return self.groups.apply(self.deepspeed.optimizer, factor)

    def accumulate(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of one micro-batch; after the `last` of a step they are reduced over ranks.

        `loss` is already scaled so that the mean over ranks of the sum over micro-batches is the gradient wanted, so
        DeepSpeed must not divide by the number of micro-batches. Nor may it count them to find the last one: their
        number changes where a batch grows.
        """
        self.deepspeed.set_gradient_accumulation_boundary(last)
        self.deepspeed.backward(loss, scale_wrt_gas=False)
        if not last:
            self.deepspeed.step()  # no update here: it only counts the micro-batch

    def update(self) -> float:
        """Clip and take the optimizer's step after the last micro-batch; returns the global norm before clipping.

        With a non-finite norm no weight is changed, and the norm returned is inf or nan.
        """
        if self.deepspeed.zero_optimization():
            self.deepspeed.step()  # an invalid norm makes ZeRO skip the update, and say inf
            return float(self.deepspeed.get_global_grad_norm())
        # Stage 0 keeps no norm, and would apply a non-finite one. Its gradients are reduced, and equal on all ranks.
        norm = float(nn.utils.get_total_norm([p.grad for p in self.module.parameters() if p.grad is not None]))
        if math.isfinite(norm):
            self.deepspeed.step()
        else:
            self.deepspeed.zero_grad()
            self.deepspeed.micro_steps += 1
        return norm


def _gather_in_bf16(engine: Any) -> None:
    """Let ZeRO-3 gather in bf16 what autocast rounds to bf16 before any use: half the bytes, and the same results.

    The shares that are gathered from, and that the optimizer updates, stay in single precision. DeepSpeed reads a
    parameter's `comm_dtype` where it gathers for a module; for the reduction of gradients it would read it as well,
    hence the second line.
    """
    for module in engine.module.modules():
        for parameter in products_only(module):
            parameter.comm_dtype = torch.bfloat16
    engine.optimizer.get_param_comm_dtype = lambda parameter: torch.float32


def _require_real(model: nn.Module) -> None:
    """ZeRO flattens parameters into real buffers, and drops imaginary parts with no more than a warning."""
    for name, parameter in model.named_parameters():
        if parameter.is_complex():
            raise deepspeed_json.DeepSpeedConfigError(
                f"parameter {name} is complex, and ZeRO would drop its imaginary part: store real pairs (..., 2), and "
                "take the complex number from them where it is used"
            )
