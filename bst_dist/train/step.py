"""One training step: the gradients of all micro-batches, slice by slice, and one optimizer update.

The only parallelism in the trainer is the sum of tokens, nats and bytes over all ranks. The loader decides which rows
and slices a rank has, the `Past` does the communication inside the model, and the engine shards weights and gradients.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bst_dist.activation.edges import edges_in
from bst_dist.checkpoint.snapshot import Position
from bst_dist.faults.config import GuardConfig
from bst_dist.faults.guard import Guard, RollBack
from bst_dist.faults.ledger import Ledger
from bst_dist.model.document_mask import Borders, places_of
from bst_dist.parallel.sequence.neighbour import past_of_slice
from bst_dist.parallel.sequence.slices import go_backward
from bst_dist.report.metrics import MixedReport, SkippedReport, StepReport, bits_per_byte
from bst_dist.report.utilisation import Utilisation
from bst_dist.train.config import ScheduleConfig, TrainConfig
from bst_dist.train.schedule import factor
from data_pipeline.serve.slices import Blank, slices_of

if TYPE_CHECKING:
    from bst_dist.parallel.sequence.past import EarlierCall
    from bst_dist.train.context import Context
    from data_pipeline.serve.batch import Batch
    from data_pipeline.serve.slices import MicroBatch


class Trainer:
    """Takes the steps of a run and keeps its progress: tokens, carried states, skipped data."""

    def __init__(
        self,
        config: TrainConfig,
        schedule: ScheduleConfig,
        rate: float,
        context: Context,
        utilisation: Callable[[int], Utilisation],
        corpora: Sequence[str] = (),
    ) -> None:
        """`rate`: the recipe's peak learning rate, for the reports. `utilisation`: returns, for a sequence length, the
        FLOPs per token and the peak of all ranks, for MFU and HFU. `corpora`: names of the corpora of a mixture, whose
        losses are reported separately; empty for a single corpus."""
        self.config, self.schedule, self.rate = config, schedule, rate
        self.utilisation, self.corpora = utilisation, corpora
        self.context, self.engine, self.ranks = context, context.engine, context.ranks
        self.edges = edges_in(config.edges)
        self.start_from(Position(step=0, tokens=0, data={}, carried=[]), Guard(GuardConfig(), Ledger()))

    def start_from(self, position: Position, guard: Guard) -> None:
        """Continue from `position`, whose weights the engine already holds. `guard`: judges the steps from there on."""
        self.guard = guard
        self.tokens = position.tokens
        """Valid tokens trained on so far, over all ranks."""
        self.skipped = position.skipped
        """Number of steps whose data was skipped by roll-backs: step s trains on the data of step s + skipped."""
        self.carried: list[dict[str, Any]] = position.carried
        """Rows, position and state after the last step, one entry per micro-batch; empty when nothing is carried."""

    def step(self, step: int, batches: Sequence[MicroBatch], began: float) -> StepReport | None:
        """Update the weights once, with the mean loss over all valid tokens of the step; return the step's report.

        `began`: the time at which the step began (`time.perf_counter`). Returns None when a rank had no data because it
        received a signal while it waited for data (`Blank`): nothing has changed then, and the ranks have agreed to
        stop. Returns a SkippedReport when the guard rejected the step. Raises RollBack or DivergedError when the run
        cannot continue from here; no weight has changed then.
        """
        carried = list(self.carried)
        multiplier = factor(self.schedule, step, self.config.steps)
        rates = self.engine.set_rates(multiplier)
        gradients = self._accumulate(step, batches)
        self.ranks.phases.enter("optimizer")
        norm = self.engine.update()
        sums = gradients.read()  # the host waits for the device here, and above for the norm
        if sums.missing:
            self.carried[:] = carried
            return None
        rate = self.rate * multiplier
        rejected = self.guard.loss(sums.loss, step, self.skipped, rate)
        rejected = rejected or self.guard.gradient(norm, step, self.skipped, rate)
        if rejected is None:
            self.tokens += int(sums.tokens)
            self.guard.taken(sums.loss)
        elif rejected.action == "roll-back":
            raise RollBack(rejected)
        else:
            self.carried.clear()  # the rejected step computed these states, so the rows start without a past
        report = self._report(step, sums, norm, rate, rates, time.perf_counter() - began)
        if rejected:
            return SkippedReport(**vars(report))
        return MixedReport(**vars(report), **sums.by_corpus(self.corpora)) if self.corpora else report

    def _report(
        self, step: int, sums: _Sums, norm: float, rate: float, rates: Mapping[str, float], seconds: float
    ) -> StepReport:
        """`rate`: the recipe's learning rate in this step. `rates`: those of the parameter groups, by name."""
        utilisation = self.utilisation(self.config.lengths.at(step + self.skipped))
        return StepReport(
            step=step + 1,
            tokens=self.tokens,
            loss_nats=sums.loss,
            bits_per_byte=bits_per_byte(sums.nats, sums.text_bytes),
            gradient_norm=norm,
            learning_rate=rate,
            ssm_learning_rate=rates.get("ssm", 0.0),
            step_time_s=seconds,
            tokens_per_s=sums.tokens / seconds,
            mfu=utilisation.mfu(sums.tokens / seconds),
            hfu=utilisation.hfu(sums.tokens / seconds),
            z_loss=self.config.z_loss * sums.squares / max(1.0, sums.tokens),
        )

    def _accumulate(self, step: int, batches: Sequence[MicroBatch]) -> _Gradients:
        """Accumulate the gradients of all micro-batches; only DeepSpeed may wait for the device (docs/gpu.md)."""
        gradients = _Gradients(self.context, self.guard, len(self.corpora), step, batches)
        for index, batch in enumerate(batches):
            slices = slices_of(batch)
            earlier = self._earlier(index)
            last = index == len(batches) - 1
            run = _MicroBatch(self.context, gradients, slices, last, with_squares=self.config.z_loss > 0)
            left = go_backward(run, self.edges, earlier, self.config.edges_every)
            if earlier is not None:
                position = earlier.position + self.config.lengths.at(step + self.skipped)
                self.carried[index] = {"rows": slices[0].rows.tolist(), "position": position, "state": left}
        return gradients

    def _earlier(self, index: int) -> EarlierCall | None:
        """Return the past that the rows of micro-batch `index` left in the previous step; None without carrying."""
        if not self.config.carry:
            return None
        if index == len(self.carried):
            self.carried.append({"position": 0, "state": {}})
        before = self.carried[index]
        state = {name: tensor.to(self.ranks.device) for name, tensor in before["state"].items()}
        return self.engine.module.carry(state, before["position"])


class _Sums(NamedTuple):
    """Sums of one step over all ranks."""

    nats: float
    """Negative log-likelihood in nats, summed over the valid labels."""
    text_bytes: float
    """Bytes of text that the valid labels stand for."""
    squares: float
    """Sum of (log Z)^2 over the valid labels; 0 without a z-loss."""
    stop_requests: float
    """Number of ranks that want to stop."""
    tokens: float
    """Number of valid labels."""
    missing: float
    """Number of ranks that had no data."""
    parts: list[float]
    """Nats and valid labels of each corpus of a mixture, alternating."""

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood of the valid labels, in nats; 0 if there are none."""
        return self.nats / max(1.0, self.tokens)

    def by_corpus(self, names: Sequence[str]) -> dict[str, Any]:
        """Return the fields that `MixedReport` adds."""
        both = list(zip(names, self.parts[::2], self.parts[1::2], strict=True))
        losses = {name: nats / tokens for name, nats, tokens in both if tokens}
        return {"tokens_by_corpus": {name: int(tokens) for name, _, tokens in both}, "loss_by_corpus": losses}


class _Gradients:
    """The gradients of one step, accumulated slice by slice and micro-batch by micro-batch.

    DeepSpeed averages over ranks. With the loss scaled by world / tokens, the gradient is that of the mean over all
    tokens. To reject a step, its last loss is multiplied by infinity: in every ZeRO stage, DeepSpeed drops the
    accumulated gradients when one is infinite. The device compares the loss with the guard's limit, so the host can
    queue the backward pass while the forward pass runs.
    """

    def __init__(self, context: Context, guard: Guard, corpora: int, step: int, batches: Sequence[MicroBatch]) -> None:
        """`corpora`: number of corpora whose losses are summed separately. `batches`: this rank's part of the step."""
        self.ranks, self.stop, self.guard, self.step = context.ranks, context.stop, guard, step
        count = sum(int(part.loss_mask.sum()) for batch in batches for part in slices_of(batch))
        counts = (self._device_scalar(count), self._device_scalar(isinstance(batches, Blank)))
        self.counts = self.ranks.all_reduce(torch.cat(counts))
        """(2,): valid labels, and ranks without data; over all ranks."""
        self.tokens, self.missing = self.counts.split(1)
        self.sums = torch.zeros(2, dtype=torch.float64, device=self.ranks.device)
        """This rank's nats and bytes of text."""
        self.squares = self._device_scalar(0)
        self.parts = torch.zeros(corpora, 2, dtype=torch.float64, device=self.ranks.device)
        """This rank's nats and labels of each corpus of a mixture."""
        self.scale = self.ranks.world / self.tokens.clamp(min=1)
        self._sums: Tensor | None = None

    def check_loss(self) -> None:
        """Sum all losses of the step over ranks; make the scale infinite when the loss is bad or data is missing."""
        asks_to_stop = self._device_scalar(self.stop.local_request)
        sums = self.ranks.all_reduce(torch.cat((self.sums, self.squares, asks_to_stop, self.parts.flatten())))
        self._sums = torch.cat((sums, self.counts))
        loss = sums[:1] / self.tokens.clamp(min=1)
        good = loss.isfinite() & (loss <= self.guard.limit) & (self.missing == 0)
        self.scale = self.scale.masked_fill(~good, math.inf)

    def scaled(self, total: Tensor) -> Tensor:
        """Return the loss to backpropagate for a slice; `total`: its loss, summed over labels."""
        return total * self.scale.squeeze(0).to(total.dtype)

    def read(self) -> _Sums:
        """Wait for the step's sums and return them; also let this rank learn whether the ranks stop."""
        nats, text_bytes, squares, stop_requests, *parts, tokens, missing = self._sums.tolist()
        sums = _Sums(nats, text_bytes, squares, stop_requests, tokens, missing, parts)
        self.stop.update(sums.stop_requests + sums.missing)
        return sums

    def _device_scalar(self, value: float) -> Tensor:
        """Return a (1,) float64 tensor on the device, filled by a kernel: a copy from the host would synchronize."""
        return torch.full((1,), float(value), dtype=torch.float64, device=self.ranks.device)


class _MicroBatch:
    """One micro-batch of a step, run slice by slice; a `SlicedSequence` for `go_backward`."""

    def __init__(
        self, context: Context, gradients: _Gradients, slices: Sequence[Batch], last: bool, with_squares: bool
    ) -> None:
        """`last`: whether it is the last micro-batch of the step. `with_squares`: sum (log Z)^2, for the z-loss."""
        self.context, self.engine, self.ranks = context, context.engine, context.ranks
        self.gradients, self.slices = gradients, slices
        self.last, self.with_squares = last, with_squares
        self.lengths = [part.input_ids.shape[1] * context.shares for part in slices]
        self._no_edge = self._begin_documents()

    def needs_no_edge(self, s: int) -> bool:
        return self._no_edge[s]

    def run_for_edge(self, s: int, past: EarlierCall) -> None:
        inputs = self._inputs(s, past)
        self.engine.forward(inputs["input_ids"], starts=inputs["starts"], past=inputs["past"])

    def loss(self, s: int, past: EarlierCall | None) -> Tensor:
        inputs = self._inputs(s, past)
        losses = self.engine.forward(**inputs)
        self.gradients.sums += sum_of_batch(losses, inputs, self.context.token_bytes)
        if len(self.gradients.parts):
            of_rows = nats_and_labels(losses.per_token, inputs["loss_mask"]).sum(1)
            self.gradients.parts.index_add_(0, to_device(self.slices[s].corpora, of_rows.device), of_rows)
        if self.with_squares:
            self.gradients.squares += losses.squares
        if self.last and s == 0:
            self.gradients.check_loss()
        return self.gradients.scaled(losses.total)

    def backward(self, s: int, loss: Tensor) -> None:
        self.ranks.phases.enter("backward")
        self.engine.accumulate(loss, self.last and s == 0)

    def _inputs(self, s: int, past: EarlierCall | None) -> dict[str, Any]:
        """Return the model's arguments for slice `s`, and report progress to the watchdog.

        A row that does not continue where the previous step stopped (a new pass over the corpus) begins like a new
        document.
        """
        part = self.slices[s]
        self.ranks.phases.enter("forward", self.gradients.step + 1)
        if s == 0 and past is not None and past.position and not part.continues.all():
            part = replace(part, starts=_with_starts(part, self.engine.module.config.block))
        inputs = on_device(part, self.ranks.device)
        return {**inputs, "past": past_of_slice(self.context.sharing, part.input_ids.shape[1], past)}

    def _begin_documents(self) -> list[bool]:
        """Return for each slice whether all its rows begin a document: then no earlier slice must be run for its edge.

        Where ranks communicate in that pass (sp, ZeRO-3), they must agree, so the answer is a sum over ranks.
        """
        if len(self.slices) == 1 or self.slices[0].starts is None:
            return [False] * len(self.slices)
        begins = [
            part.begin % length or part.starts[:, 0].all()  # only the first rank of a sequence knows
            for part, length in zip(self.slices, self.lengths, strict=True)
        ]
        if self.context.sharing or self.engine.stage == 3:
            return [not count for count in self.ranks.all_reduce_numbers([float(not begin) for begin in begins])]
        return [bool(begin) for begin in begins]


def on_device(batch: Batch, device: torch.device) -> dict[str, Any]:
    """Return the model's arguments for one slice: (b, l) ids, labels and mask, and the starts of documents.

    The starts are per block, or per token (then as `Borders`) where a document may begin at any token.
    """
    inputs = {name: to_device(getattr(batch, name), device) for name in ("input_ids", "labels", "loss_mask")}
    starts = batch.starts
    if starts is None:
        return {**inputs, "starts": None}
    if starts.shape == batch.input_ids.shape:
        return {**inputs, "starts": Borders(*(to_device(x, device) for x in (starts, places_of(starts))))}
    return {**inputs, "starts": to_device(starts, device)}


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy the array to the device; to a GPU from pinned memory, because any other copy waits for the GPU's work.

    Pinned memory must also be contiguous: torch would copy any other first to ordinary memory, and from there to the
    GPU. The loaders' arrays are contiguous already.
    """
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def sum_of_batch(losses: Any, inputs: dict[str, Any], token_bytes: Tensor) -> Tensor:
    """Return (2,) float64: the nats of the valid labels in `inputs`, and the bytes of text that they stand for."""
    text_bytes = (token_bytes[inputs["labels"]] * inputs["loss_mask"]).sum()
    return torch.stack((losses.nats.double(), text_bytes.double()))


def nats_and_labels(per_token: Tensor, mask: Tensor) -> Tensor:
    """Return (b, l, 2) float64: the nats of each token, and whether its label is valid; inputs are (b, l)."""
    return torch.stack((per_token.double(), mask.double()), dim=-1)


def _with_starts(batch: Batch, block: int) -> np.ndarray:
    """Return the batch's document starts (per block if it has none) plus a start for each row that does not continue.

    All ranks that share the rows must have starts, although only the first of them holds the rows' first blocks.
    """
    rows, length = batch.input_ids.shape
    starts = np.zeros((rows, length // block), bool) if batch.starts is None else batch.starts.copy()
    starts[:, 0] |= ~batch.continues & (batch.begin == 0)
    return starts
