"""Evaluation during training: the loss on a fixed number of sequences of the validation split.

An `Evaluation` measures one set of sequences. The callback `Evaluate` decides after which steps all sets are evaluated,
also with the averaged weights, and passes the results to the writers.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from bst_dist.parallel.sequence.neighbour import past_of_slice
from bst_dist.parallel.sequence.past import EarlierCall, Past
from bst_dist.report.callback import Callback
from bst_dist.report.metrics import EvalReport, StepReport, Writer, bits_per_byte, nats_per_token
from bst_dist.train.config import EvaluationConfig
from bst_dist.train.step import nats_and_labels, on_device, sum_of_batch
from data_pipeline.serve.slices import slices_of

if TYPE_CHECKING:
    from bst_dist.report.probes import Probes
    from bst_dist.train.average import Average
    from bst_dist.train.context import Context
    from data_pipeline.serve.batch import Batch
    from data_pipeline.serve.slices import MicroBatch


PHASE = "evaluate"
"""Phase that the time of evaluations is reported under."""


class Evaluation:
    """Measures the loss on one set of validation sequences; a subclass measures other quantities."""

    def __init__(self, context: Context, batches: Sequence[MicroBatch]) -> None:
        """`batches`: this rank's share of the sequences, at least one micro-batch."""
        self.context, self.batches = context, batches
        self.engine, self.ranks, self.stop = context.engine, context.ranks, context.stop

    def forward(self, step: int) -> Iterator[tuple[Any, dict[str, Any], Any]]:
        """Run the model without gradients, and yield (batch, inputs on the device, losses) of each slice.

        Slices of a sequence are computed in order, each with the state that the one before left. Yields fewer when the
        ranks agree to stop (`stop.stopping`).
        """
        self.engine.module.eval()
        for batch, past in self._slices():
            self.ranks.phases.enter(PHASE, step)  # reports progress to the watchdog
            if self.stop.poll():
                break
            inputs = on_device(batch, self.ranks.device)
            with torch.no_grad():
                losses = self.engine.forward(**inputs, past=past)
            yield batch, inputs, losses
        self.engine.module.train()

    def evaluate(self, step: int) -> EvalReport | None:
        """Return the loss of the current weights, or None when the ranks agree to stop; every rank must call it."""
        start = time.perf_counter()
        block = self.engine.module.config.block
        sums = torch.zeros(2, dtype=torch.float64, device=self.ranks.device)
        shares, share_rank = self.context.shares, self.context.sharing.rank if self.context.sharing else 0
        slices = slices_of(self.batches[0])
        blocks = slices[0].input_ids.shape[1] // block  # of a rank's share of one slice
        by_block = torch.zeros(len(slices), shares, blocks, 2, dtype=torch.float64, device=self.ranks.device)
        tokens = 0
        for part, inputs, losses in self.forward(step):
            sums += sum_of_batch(losses, inputs, self.context.token_bytes)
            at = part.begin // (shares * blocks * block)
            by_block[at, share_rank] += _by_block(losses.per_token, inputs["loss_mask"], block)
            tokens += int(part.loss_mask.sum())
        if self.stop.stopping:
            return None
        nats, text_bytes, tokens, *of_blocks = self.ranks.all_reduce_numbers(
            [*sums.tolist(), tokens, *by_block.flatten().tolist()]
        )
        return EvalReport(
            step=step,
            split="validation",
            tokens=int(tokens),
            loss_nats=nats_per_token(nats, tokens),
            bits_per_byte=bits_per_byte(nats, text_bytes),
            loss_by_block=[nats_per_token(*of_block) for of_block in zip(of_blocks[::2], of_blocks[1::2], strict=True)],
            time_s=time.perf_counter() - start,
        )

    def _slices(self) -> Iterator[tuple[Batch, Past]]:
        """Yield every slice of every micro-batch with its past."""
        for micro_batch in self.batches:
            slices = slices_of(micro_batch)
            position, state = 0, {}
            for part in slices:
                length = part.input_ids.shape[1]
                earlier = EarlierCall(state, position) if len(slices) > 1 else None
                yield part, past_of_slice(self.context.sharing, length, earlier)
                if earlier is not None:
                    state, position = earlier.after, position + length * self.context.shares


class Evaluations(NamedTuple):
    """All sets of sequences that a run is evaluated on."""

    validation: Evaluation | None
    """On the validation split of the run's own data; None when there is none."""
    further: Sequence[Evaluation] = ()
    """On additional corpora."""


class Evaluate(Callback):
    """Evaluates every `evaluation.every` steps and after the last step of the run.

    The last step of a start that was stopped early is not evaluated: so a resumed run reports what an uninterrupted
    one reports.
    """

    phase = PHASE

    def __init__(
        self,
        config: EvaluationConfig,
        steps: int,
        evaluations: Evaluations,
        writers: Sequence[Writer],
        average: Average | None = None,
        probes: Probes | None = None,
    ) -> None:
        """`steps`: of the whole run. `average`: the averaged weights, which are evaluated too. `probes`: measurements
        inside the model during its own evaluation."""
        self.config, self.steps, self.evaluations, self.writers = config, steps, evaluations, writers
        self.average, self.probes = average, probes

    def due(self, step: int) -> bool:
        """Whether the run is evaluated after `step` steps; always False without validation data."""
        if not self.evaluations.validation and not self.evaluations.further:
            return False
        return step == self.steps or bool(self.config.every and step % self.config.every == 0)

    def missed(self, lines: Sequence[dict[str, Any]], step: int) -> bool:
        """Whether an earlier start was stopped before its evaluation after `step`; `lines`: its metrics."""
        kinds = {line["kind"] for line in lines if line["step"] == step}
        wanted = "eval" if self.evaluations.validation else "corpus"
        return self.due(step) and bool(kinds & {"train", "skipped"}) and wanted not in kinds

    def after_step(self, report: StepReport, last: bool) -> None:
        if self.due(report.step):
            self.evaluate_and_report(report.step)

    def evaluate_and_report(self, step: int) -> None:
        """Evaluate, then report all losses together, or none of them if the ranks agree to stop before the last one.

        The next start repeats an evaluation of which nothing was reported (`missed`).
        """
        reports: list[EvalReport] = []
        for report in self._reports(step):
            if report is None:
                return
            reports.append(report)
        for report in reports:
            for writer in self.writers:
                writer.write(report)
        if self.evaluations.validation and self.probes:
            self.probes.report(step)

    def _reports(self, step: int) -> Iterator[EvalReport | None]:
        """Yield the losses on every set of sequences, then those of the averaged weights; None: the ranks stop."""
        validation, further = self.evaluations
        if validation:
            with self.probes.watching() if self.probes else nullcontext():
                report = validation.evaluate(step)
            yield report
        for other in further:
            yield other.evaluate(step)
        if self.average:
            for evaluation in [validation] if validation else further:
                with self.average.in_place():
                    report = evaluation.evaluate(step)
                yield None if report is None else report.of_average()


def _by_block(per_token: Tensor, mask: Tensor, block: int) -> Tensor:
    """Return (l / W, 2) float64: nats and valid tokens of each block, summed over rows; inputs are (b, l)."""
    return nats_and_labels(per_token, mask).unflatten(1, (-1, block)).sum((0, 2))
