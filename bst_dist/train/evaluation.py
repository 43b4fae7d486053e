"""The loss on a bounded, fixed part of the validation split, during training."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bst_dist.parallel.neighbour import past_of_slice
from bst_dist.report.metrics import Callback, EvalReport, StepReport, Writer, bits_per_byte
from bst_dist.train.config import EvaluationConfig
from bst_dist.train.loop import on_device, sum_of_batch

if TYPE_CHECKING:
    from bst_dist.faults.signals import Stop
    from bst_dist.parallel.group import SequenceGroup
    from bst_dist.parallel.ranks import Ranks
    from bst_dist.report.probes import Probes
    from bst_dist.train.engine import Engine
    from data_pipeline.serve.batch import Batch


class Evaluate(Callback):
    """Evaluates every so many steps, and after the last of the run: where a start ends leaves no trace."""

    phase = "evaluate"

    def __init__(self, config: EvaluationConfig, batches: Sequence[Batch], engine: Engine, ranks: Ranks,
                 token_bytes: Tensor, writers: Sequence[Writer], steps: int, stop: Stop,
                 sharing: SequenceGroup | None = None) -> None:  # fmt: skip
        """`batches`: this rank's share of the validation sequences; `steps`: of the whole run; `sharing`: the ranks
        that have the other slices."""
        self.config, self.batches, self.engine, self.ranks = config, batches, engine, ranks
        self.token_bytes, self.writers, self.steps, self.stop, self.sharing = token_bytes, writers, steps, stop, sharing
        self.probes: Probes | None = None
        """What looks into the model while it is evaluated."""

    def due(self, step: int) -> bool:
        """Whether the run is evaluated after so many steps."""
        return step == self.steps or bool(self.config.every and step % self.config.every == 0)

    def owed(self, lines: Sequence[dict[str, Any]], step: int) -> bool:
        """Whether a signal kept an earlier start from evaluating after its last step, as its `lines` say."""
        kinds = {line["kind"] for line in lines if line["step"] == step}
        return self.due(step) and bool(kinds & {"train", "skipped"}) and "eval" not in kinds

    def after_step(self, report: StepReport, last: bool) -> None:
        if self.due(report.step):
            self.make(report.step)

    def make(self, step: int) -> None:
        """Evaluate, and write down what comes of it; given up when the ranks are told to stop."""
        with self.probes.watching() if self.probes else nullcontext():
            found = self.evaluate(step)
        if found is None:
            return
        for writer in self.writers:
            writer.write(found)
        if self.probes:
            self.probes.look(step)

    def forward(self, step: int) -> Iterator[tuple[Any, dict[str, Any], Any]]:
        """(batch, its inputs on the device, what the model makes of them) of each batch, without gradients.

        Fewer when the ranks were told to stop (`stop.agreed`).
        """
        self.engine.module.eval()
        for batch in self.batches:
            self.ranks.phases.enter(self.phase, step)  # the watchdog sees that it moves
            if self.stop.poll():
                break
            inputs = on_device(batch, self.ranks.device)
            with torch.no_grad():
                found = self.engine.forward(**inputs, past=past_of_slice(self.sharing, batch.input_ids.shape[1]))
            yield batch, inputs, found
        self.engine.module.train()

    def evaluate(self, step: int) -> EvalReport | None:
        """The loss of the model as it is, or None when the ranks were told to stop; every rank must call it."""
        start = time.perf_counter()
        block = self.engine.module.config.block
        sums = torch.zeros(2, dtype=torch.float64, device=self.ranks.device)
        slices, own = (self.sharing.size, self.sharing.rank) if self.sharing else (1, 0)
        blocks = self.batches[0].input_ids.shape[1] // block  # of one slice
        by_block = torch.zeros(slices, blocks, 2, dtype=torch.float64, device=self.ranks.device)
        tokens = 0
        for batch, inputs, losses in self.forward(step):
            sums += sum_of_batch(losses, inputs, self.token_bytes)
            by_block[own] += _by_block(losses.per_token, inputs["loss_mask"], block)
            tokens += int(batch.loss_mask.sum())
        if self.stop.agreed:
            return None
        nats, text_bytes, tokens, *of_blocks = self.ranks.sum([*sums.tolist(), tokens, *by_block.flatten().tolist()])
        return EvalReport(
            step=step,
            split="validation",
            tokens=int(tokens),
            loss_nats=nats / max(1.0, tokens),
            bits_per_byte=bits_per_byte(nats, text_bytes),
            loss_by_block=[n / max(1.0, t) for n, t in zip(of_blocks[::2], of_blocks[1::2], strict=True)],
            time_s=time.perf_counter() - start,
        )


def _by_block(per_token: Tensor, mask: Tensor, block: int) -> Tensor:
    """(l / W, 2) float64: nats and valid tokens of each block of a slice, (b, l) each, over its rows."""
    both = torch.stack((per_token.double(), mask.double()), dim=-1)
    return both.unflatten(1, (-1, block)).sum((0, 2))
