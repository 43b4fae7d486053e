"""Taking a step: gradients of all micro-batches, slice by slice, and one update, over whatever ranks there are.

The trainer knows no parallelism beyond this: sums over all ranks of tokens, nats and bytes. Which rows and slices a
rank has is the loader's affair, what crosses between ranks inside the model is the past's, and where weights and
gradients lie is the engine's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bst_dist.activation.edges import edges_in
from bst_dist.faults.config import GuardConfig
from bst_dist.faults.guard import Guard, RollBack
from bst_dist.faults.ledger import Ledger
from bst_dist.faults.signals import Stop
from bst_dist.model.borders import Borders, places_of
from bst_dist.parallel.sequence.neighbour import past_of_slice
from bst_dist.parallel.sequence.slices import go_backward
from bst_dist.report.metrics import MixedReport, SkippedReport, StepReport, bits_per_byte
from bst_dist.report.utilisation import Speed
from bst_dist.train.config import ScheduleConfig, TrainConfig
from bst_dist.train.schedule import factor
from data_pipeline.serve.slices import Blank, slices_of

if TYPE_CHECKING:
    from bst_dist.parallel.ranks import Ranks
    from bst_dist.parallel.sequence.group import SequenceGroup
    from bst_dist.parallel.sequence.past import EarlierCall
    from bst_dist.train.engine import Engine
    from data_pipeline.serve.batch import Batch
    from data_pipeline.serve.slices import MicroBatch


class Trainer:
    """Takes a run's steps, and knows how far it is."""

    def __init__(self, config: TrainConfig, schedule: ScheduleConfig, engine: Engine, ranks: Ranks,
                 token_bytes: Tensor, speed: Callable[[int], Speed], sharing: SequenceGroup | None = None,
                 stop: Stop | None = None, guard: Guard | None = None) -> None:  # fmt: skip
        """`token_bytes`: (V,) bytes of text each id stands for, on the rank's device; `speed`: what the duration of a
        step with sequences of a length is judged by; `sharing`: the ranks that hold
        the other slices of this rank's sequences, None when it holds whole ones."""
        self.config, self.schedule, self.engine, self.ranks = config, schedule, engine, ranks
        self.token_bytes, self.speed, self.sharing = token_bytes, speed, sharing
        self.stop = stop or Stop(ranks)
        self.guard = guard or Guard(GuardConfig(), Ledger())
        self.tokens = 0
        self.skipped = 0
        """Steps' worth of data skipped by rollbacks: step s has the data of step s + skipped."""
        self.corpora: Sequence[str] = ()
        """Names of the corpora of a mixture, whose losses are told apart; none where there is but one."""
        self.edges = edges_in(config.edges)
        self.carried: list[dict[str, Any]] = []
        """The past left by each micro-batch of the last step, in order; empty when nothing is carried."""

    def step(self, step: int, batches: Sequence[MicroBatch], start: float) -> StepReport | None:
        """One update of the weights with the mean loss over all valid tokens of the step; `start`: when it began.

        None when a rank had no data, because it was told to stop while it waited (`Blank`): nothing has changed then,
        and the ranks have agreed to stop. The guard may hold the step back: then the report is a SkippedReport. Raises
        RollBack, or DivergedError, when the run cannot continue from here; no weight has changed then.
        """
        carried = list(self.carried)
        rates = self.engine.set_rates(factor(self.schedule, step, self.config.steps))
        rate = rates["matrices"]
        gradients = self._accumulate(step, batches)
        self.ranks.phases.enter("optimizer")
        norm = self.engine.update()
        found = gradients.read()  # here the host waits for the device, as the engine did for the norm
        if found.missing:
            self.carried[:] = carried
            return None
        tokens, loss = found.tokens, found.nats / max(1.0, found.tokens)
        held = self.guard.loss(loss, step, self.skipped, rate) or self.guard.gradient(norm, step, self.skipped, rate)
        if held is None:
            self.tokens += int(tokens)
            self.guard.taken(loss)
        elif held.action == "roll-back":
            raise RollBack(held)
        else:
            self.carried.clear()  # as bad as the step: the rows begin anew
        seconds = time.perf_counter() - start
        speed = self.speed(self.config.length_at(step + self.skipped))
        report = StepReport(
            step=step + 1,
            tokens=self.tokens,
            loss_nats=loss,
            bits_per_byte=bits_per_byte(found.nats, found.text_bytes),
            gradient_norm=norm,
            learning_rate=rate,
            ssm_learning_rate=rates.get("ssm", 0.0),
            step_time_s=seconds,
            tokens_per_s=tokens / seconds,
            mfu=speed.mfu(tokens / seconds),
            hfu=speed.hfu(tokens / seconds),
            z_loss=self.config.z_loss * found.squares / max(1.0, tokens),
        )
        if held:
            return SkippedReport(**vars(report))
        return MixedReport(**vars(report), **found.by_corpus(self.corpora)) if self.corpora else report

    def _accumulate(self, step: int, batches: Sequence[MicroBatch]) -> _Gradients:
        """Gradients of all micro-batches; nothing here waits for the device."""
        gradients = _Gradients(self, step, batches)
        for index, batch in enumerate(batches):
            slices = slices_of(batch)
            earlier = self._earlier(index)
            run = _MicroBatch(gradients, slices, last=index == len(batches) - 1)
            left = go_backward(run, self.edges, earlier, self.config.edges_every)
            if earlier is not None:
                position = earlier.position + self.config.length_at(step + self.skipped)
                self.carried[index] = {"rows": slices[0].rows.tolist(), "position": position, "state": left}
        return gradients

    def _earlier(self, index: int) -> EarlierCall | None:
        """What the same rows as this step's micro-batch `index` left in the step before; None if nothing is carried."""
        if not self.config.carry:
            return None
        if index == len(self.carried):
            self.carried.append({"position": 0, "state": {}})
        before = self.carried[index]
        state = {name: tensor.to(self.ranks.device) for name, tensor in before["state"].items()}
        return self.engine.module.carry(state, before["position"])


class _Found(NamedTuple):
    """Sums of a step over all ranks."""

    nats: float
    """Of all labels that count."""
    text_bytes: float
    """That these labels stand for."""
    squares: float
    """Of log Z of these labels; 0 without a z-loss."""
    wishes: float
    """Ranks that were told to stop."""
    tokens: float
    """Labels that count."""
    missing: float
    """Ranks that had no data."""
    parts: list[float]
    """Nats and labels of each corpus of a mixture."""

    def by_corpus(self, names: Sequence[str]) -> dict[str, Any]:
        """The fields of `MixedReport`."""
        both = list(zip(names, self.parts[::2], self.parts[1::2], strict=True))
        losses = {name: nats / tokens for name, nats, tokens in both if tokens}
        return {"tokens_by_corpus": {name: int(tokens) for name, _, tokens in both}, "loss_by_corpus": losses}


class _Gradients:
    """The gradients of one step as they come together, slice by slice and micro-batch by micro-batch.

    DeepSpeed averages over ranks: with a factor of world / tokens the gradient is that of the mean over all tokens.
    A step that is held back goes backward as infinite: what DeepSpeed does with an infinite gradient in any stage,
    with whatever it has accumulated, is to drop it. Whether it is held back is decided on the device, by the guard's
    limit, so that the host can queue the backward pass while the forward pass runs.
    """

    def __init__(self, trainer: Trainer, step: int, batches: Sequence[MicroBatch]) -> None:
        self.trainer, self.step = trainer, step
        count = sum(int(part.loss_mask.sum()) for batch in batches for part in slices_of(batch))
        own = (self._number(count), self._number(isinstance(batches, Blank)))
        self.counts = trainer.ranks.add_up(torch.cat(own))
        """Labels that count, and ranks without data."""
        self.tokens, self.missing = self.counts.split(1)
        self.sums = torch.zeros(2, dtype=torch.float64, device=trainer.ranks.device)
        """This rank's nats and bytes of text."""
        self.squares = self._number(0)
        self.parts = torch.zeros(len(trainer.corpora), 2, dtype=torch.float64, device=trainer.ranks.device)
        """This rank's nats and labels of each corpus of a mixture."""
        self.scale = trainer.ranks.world / self.tokens.clamp(min=1)
        self._found: Tensor | None = None

    def judge(self) -> None:
        """All losses of the step are there: sum them over ranks, and hold the step back if the loss is bad."""
        trainer = self.trainer
        own = (self.sums, self.squares, self._number(trainer.stop.wish), self.parts.flatten())
        sums = trainer.ranks.add_up(torch.cat(own))
        self._found = torch.cat((sums, self.counts))
        loss = sums[:1] / self.tokens.clamp(min=1)
        good = loss.isfinite() & (loss <= trainer.guard.limit) & (self.missing == 0)
        self.scale = self.scale.masked_fill(~good, math.inf)

    def scaled(self, total: Tensor) -> Tensor:
        """A slice's loss, summed over its labels, as it goes backward."""
        return total * self.scale.squeeze(0).to(total.dtype)

    def read(self) -> _Found:
        """The step's sums, once the device has them; the ranks learn whether one of them was told to stop."""
        nats, text_bytes, squares, wishes, *parts, tokens, missing = self._found.tolist()
        found = _Found(nats, text_bytes, squares, wishes, tokens, missing, parts)
        self.trainer.stop.learn(found.wishes + found.missing)
        return found

    def _number(self, value: float) -> Tensor:
        """(1,) float64 on the device, by a kernel's argument: a copy from the host would wait for the device."""
        return torch.full((1,), float(value), dtype=torch.float64, device=self.trainer.ranks.device)


class _MicroBatch:
    """One micro-batch of a step, run slice by slice by the engine."""

    def __init__(self, gradients: _Gradients, slices: Sequence[Batch], last: bool) -> None:
        """`last`: of the step."""
        self.gradients, self.trainer = gradients, gradients.trainer
        self.slices, self.last = slices, last
        sharing = self.trainer.sharing
        self.lengths = [part.input_ids.shape[1] * (sharing.size if sharing else 1) for part in slices]
        self._fresh = self._begin_documents()

    def fresh(self, s: int) -> bool:
        return self._fresh[s]

    def leave(self, s: int, past: EarlierCall) -> None:
        inputs = self._inputs(s, past)
        self.trainer.engine.forward(inputs["input_ids"], starts=inputs["starts"], past=inputs["past"])

    def loss(self, s: int, past: EarlierCall | None) -> Tensor:
        inputs = self._inputs(s, past)
        losses = self.trainer.engine.forward(**inputs)
        self.gradients.sums += sum_of_batch(losses, inputs, self.trainer.token_bytes)
        if self.trainer.corpora:
            both = torch.stack((losses.per_token.double(), inputs["loss_mask"].double()), dim=-1).sum(1)
            self.gradients.parts.index_add_(0, to_device(self.slices[s].corpora, both.device), both)
        if self.trainer.config.z_loss:
            self.gradients.squares += losses.squares
        if self.last and s == 0:
            self.gradients.judge()
        return self.gradients.scaled(losses.total)

    def backward(self, s: int, loss: Tensor) -> None:
        self.trainer.ranks.phases.enter("backward")
        self.trainer.engine.accumulate(loss, self.last and s == 0)

    def _inputs(self, s: int, past: EarlierCall | None) -> dict[str, Any]:
        """What the model is called with; each slice is a sign of life to the watchdog.

        A row that does not continue where it stopped the step before (a new pass over the corpus) begins like a new
        document.
        """
        trainer, part = self.trainer, self.slices[s]
        trainer.ranks.phases.enter("forward", self.gradients.step + 1)
        if s == 0 and past is not None and past.position and not part.continues.all():
            part = replace(part, starts=_with_starts(part, trainer.engine.module.config.block))
        inputs = on_device(part, trainer.ranks.device)
        return {**inputs, "past": past_of_slice(trainer.sharing, part.input_ids.shape[1], past)}

    def _begin_documents(self) -> list[bool]:
        """Of each slice, whether all rows begin a document there: what comes before it need not be run for its edge.

        Where ranks exchange something in that pass (sp, ZeRO-3), they must agree.
        """
        trainer = self.trainer
        if len(self.slices) == 1 or self.slices[0].starts is None:
            return [False] * len(self.slices)
        own = [
            part.begin % length or part.starts[:, 0].all()  # of ranks of one sequence the first alone can tell
            for part, length in zip(self.slices, self.lengths, strict=True)
        ]
        if trainer.sharing or trainer.engine.stage == 3:
            return [not count for count in trainer.ranks.sum([float(not begins) for begins in own])]
        return [bool(begins) for begins in own]


def on_device(batch: Batch, device: torch.device) -> dict[str, Any]:
    """What the model is called with, from one micro-batch: (b, l) ids, labels and mask, and where documents begin,
    which the batch says by block, or by token where they may begin at any."""
    inputs = {name: to_device(getattr(batch, name), device) for name in ("input_ids", "labels", "loss_mask")}
    starts = batch.starts
    if starts is None:
        return {**inputs, "starts": None}
    if starts.shape == batch.input_ids.shape:
        return {**inputs, "starts": Borders(*(to_device(x, device) for x in (starts, places_of(starts))))}
    return {**inputs, "starts": to_device(starts, device)}


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """The array on the device; to a GPU through pinned memory, since any other copy waits for what the GPU does."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def sum_of_batch(losses: Any, inputs: dict[str, Any], token_bytes: Tensor) -> Tensor:
    """(2,) float64: nats of a micro-batch's valid labels, and the bytes of text they stand for."""
    text_bytes = (token_bytes[inputs["labels"]] * inputs["loss_mask"]).sum()
    return torch.stack((losses.nats.double(), text_bytes.double()))


def _with_starts(batch: Batch, block: int) -> np.ndarray:
    """The batch's starts, or of blocks, and the begin of every row that does not continue where it stopped.

    All ranks that share the rows must have starts, though only the first of them holds their first blocks.
    """
    rows, length = batch.input_ids.shape
    starts = np.zeros((rows, length // block), bool) if batch.starts is None else batch.starts.copy()
    starts[:, 0] |= ~batch.continues & (batch.begin == 0)
    return starts
