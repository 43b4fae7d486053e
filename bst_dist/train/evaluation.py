"""The loss on a bounded, fixed part of the validation split, during training."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor

from bst_dist.parallel.neighbour import past_of_slice
from bst_dist.train.loop import on_device, sum_of_batch
from bst_dist.train.metrics import Callback, EvalReport, StepReport, Writer, bits_per_byte
from data_pipeline.config import Config

if TYPE_CHECKING:
    from bst_dist.parallel.group import SequenceGroup
    from bst_dist.train.engine import Engine
    from bst_dist.train.ranks import Ranks
    from data_pipeline.batch import Batch


class EvaluationConfig(Config):
    every: int = Field(500, ge=0)
    """Steps between two evaluations; the last step always has one; 0: only that one."""
    sequences: int = Field(64, ge=1)
    """Validation sequences, of the training length, to evaluate on: the same ones on every layout of ranks."""


class Evaluate(Callback):
    """Evaluates every so many steps, and after the last."""

    def __init__(self, config: EvaluationConfig, batches: Sequence[Batch], engine: Engine, ranks: Ranks,
                 token_bytes: Tensor, writers: Sequence[Writer],
                 sharing: SequenceGroup | None = None) -> None:  # fmt: skip
        """`batches`: this rank's share of the validation sequences; `sharing`: the ranks with the other slices."""
        self.config, self.batches, self.engine, self.ranks = config, batches, engine, ranks
        self.token_bytes, self.writers, self.sharing = token_bytes, writers, sharing

    def after_step(self, report: StepReport, last: bool) -> None:
        if last or (self.config.every and report.step % self.config.every == 0):
            found = self.evaluate(report.step)
            for writer in self.writers:
                writer.write(found)

    def evaluate(self, step: int) -> EvalReport:
        """The loss of the model as it is; every rank must call it."""
        start = time.perf_counter()
        sums = torch.zeros(2, dtype=torch.float64, device=self.ranks.device)
        tokens = 0
        self.engine.module.eval()
        with torch.no_grad():
            for batch in self.batches:
                inputs = on_device(batch, self.ranks.device)
                losses = self.engine.forward(**inputs, past=past_of_slice(self.sharing))
                sums += sum_of_batch(losses, inputs, self.token_bytes)
                tokens += int(batch.loss_mask.sum())
        self.engine.module.train()
        nats, text_bytes, tokens = self.ranks.sum([*sums.tolist(), tokens])
        return EvalReport(
            step=step,
            split="validation",
            tokens=int(tokens),
            loss_nats=nats / max(1.0, tokens),
            bits_per_byte=bits_per_byte(nats, text_bytes),
            time_s=time.perf_counter() - start,
        )
