"""The DeepSpeed engine: built from the completed JSON, checked against it, and called for one update at a time.

What differs between the ZeRO stages is handled in this file and in `checkpoint.fragments`. Other files only ask which
stage it is.
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
from bst_dist.parallel.deepspeed_import import deepspeed
from bst_dist.train import deepspeed_json
from bst_dist.train.config import OptimizerConfig
from bst_dist.train.muon import Muon
from bst_dist.train.optimizer import Groups, build_for

deepspeed.runtime.zero.utils.ZERO_SUPPORTED_OPTIMIZERS.append(Muon)  # else DeepSpeed rejects it or warns


class Engine:
    """A model wrapped by DeepSpeed, with its optimizer and the hyperparameters of each parameter group."""

    def __init__(self, model: nn.Module, optimizer: OptimizerConfig, completed: dict[str, Any]) -> None:
        """Initialize DeepSpeed with `model` and the completed JSON.

        ZeRO runs over the whole world, without a model-parallel unit: sequence-parallel ranks are ordinary
        data-parallel ranks for it, because the loss is normalised by the tokens of the whole step. Raises
        DeepSpeedConfigError, naming the key, when the engine's parsed configuration differs from `completed`.
        """
        deepspeed_json.require_nvme(completed)
        _require_real(model)
        client = build_for(model, optimizer)
        self.groups = Groups(client)
        if compiled := {type(module) for module in model.modules() if getattr(module, "compiled", False)}:
            # ZeRO-3 then gathers all parameters of a compiled module before it runs, and none inside it. Other stages
            # ignore this.
            deepspeed.utils.set_z3_leaf_modules(model, list(compiled))
        self.deepspeed, *_ = deepspeed.initialize(model=model, optimizer=client, config=completed)
        if differences := deepspeed_json.differences(completed, self.deepspeed._config):
            raise deepspeed_json.DeepSpeedConfigError(
                "\n".join(f"DeepSpeed did not apply {line}" for line in differences)
            )
        if isinstance(client, Muon):
            # Through DeepSpeed's backend, where the bytes sent are counted (`parallel/communication.py`).
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
        """The unwrapped model; under ZeRO-3 its parameters are empty outside of a forward or backward pass."""
        return self.deepspeed.module

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Run the model's forward pass, under autocast when the precision is bf16."""
        return self.deepspeed(*inputs, **named)

    @contextmanager
    def gathered_parameters(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        """Keep these parameters whole on every rank inside the context, also under ZeRO-3; every rank must enter it."""
        with deepspeed.zero.GatheredParameters(parameters):
            yield

    def set_rates(self, factor: float) -> dict[str, float]:
        """Set every group's hyperparameters, learning rates scaled by `factor`; return the rates by group name."""
        return self.groups.apply(self.deepspeed.optimizer, factor)

    def accumulate(self, loss: Tensor, last: bool) -> None:
        """Run the backward pass of one micro-batch; after the `last` one of a step, reduce the gradients over ranks.

        `loss` is already scaled: the gradient of the step is the mean over ranks of the sum over micro-batches. So
        DeepSpeed must not divide by the number of micro-batches. It must not count them to find the last one either:
        their number changes when the batch size changes.
        """
        self.deepspeed.set_gradient_accumulation_boundary(last)
        self.deepspeed.backward(loss, scale_wrt_gas=False)
        if not last:
            self.deepspeed.step()  # no update here: it only counts the micro-batch

    def update(self) -> float:
        """Clip the gradients and take the optimizer step; return the global gradient norm before clipping.

        Call it after the last micro-batch. With a non-finite norm no weight changes, and inf or nan is returned.
        """
        if self.deepspeed.zero_optimization():
            self.deepspeed.step()  # with an invalid norm ZeRO skips the update and reports inf
            return float(self.deepspeed.get_global_grad_norm())
        # Stage 0 does not store the norm and would apply a non-finite update. Its gradients are already reduced, so
        # they are equal on all ranks.
        norm = float(nn.utils.get_total_norm([p.grad for p in self.module.parameters() if p.grad is not None]))
        if math.isfinite(norm):
            self.deepspeed.step()
        else:
            self.deepspeed.zero_grad()
            self.deepspeed.micro_steps += 1
        return norm


def _gather_in_bf16(engine: Any) -> None:
    """Make ZeRO-3 gather in bf16 the parameters that autocast casts to bf16 anyway: half the bytes, same results.

    The shards, which the optimizer updates, stay in single precision. DeepSpeed reads a parameter's `comm_dtype` when
    it gathers for a module. It would also read it to reduce gradients, so `get_param_comm_dtype` is replaced to keep
    that in fp32.
    """
    for module in engine.module.modules():
        for parameter in products_only(module):
            parameter.comm_dtype = torch.bfloat16
    engine.optimizer.get_param_comm_dtype = lambda parameter: torch.float32


def _require_real(model: nn.Module) -> None:
    """Raise DeepSpeedConfigError for a complex parameter: ZeRO would drop its imaginary part with only a warning."""
    for name, parameter in model.named_parameters():
        if parameter.is_complex():
            raise deepspeed_json.DeepSpeedConfigError(
                f"parameter {name} is complex, and ZeRO would drop its imaginary part: store real pairs (..., 2), and "
                "take the complex number from them where it is used"
            )
