"""Reports of a run, the base class of their writers, and `metrics.jsonl`, which has a line for each report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from math import log, nan
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

from bst_base.files import atomic_file, path_in_errors
from bst_base.json_lines import keep_dropped, read_lines

if TYPE_CHECKING:
    from torch import Tensor

FILE = "metrics.jsonl"
OF_AVERAGE = "averaged"
"""Kind of the evaluations of the averaged weights (train.average), so that readers of FILE do not mistake them for
evaluations of the weights."""


@dataclass(frozen=True)
class StepReport:
    """One training step, over all ranks."""

    kind: ClassVar[str] = "train"

    step: int
    """Steps taken so far, this one included."""
    tokens: int
    """Valid tokens trained on so far."""
    loss_nats: float
    """Mean negative log-likelihood of the step's valid tokens."""
    bits_per_byte: float
    """The same loss per byte of the text that the labels encode, in bits; NaN if labels are no text."""
    gradient_norm: float
    """Global norm before clipping."""
    learning_rate: float
    """optimizer.learning_rate times the schedule's factor in this step. Under CompleteP it is that of the base shape:
    wider matrices train with less."""
    ssm_learning_rate: float
    """Learning rate of the SSM dynamics in this step."""
    step_time_s: float
    tokens_per_s: float
    mfu: float
    """Model FLOPs utilisation: the model's FLOP/s divided by the ranks' peak; NaN if no peak is known."""
    hfu: float = 0.0
    """Hardware FLOPs utilisation: like MFU, with recomputation in the backward pass."""
    data_wait_s: float = 0.0
    """Seconds of the step that the first rank waited for its batches."""
    z_loss: float = 0.0
    """Auxiliary loss, minimised in addition: train.z_loss times the mean of log^2 Z; 0 if not used."""


@dataclass(frozen=True)
class MixedReport(StepReport):
    """A training step on several corpora, with figures by their names."""

    tokens_by_corpus: dict[str, int] = field(default_factory=dict)
    """Valid tokens of the step, by corpus."""
    loss_by_corpus: dict[str, float] = field(default_factory=dict)
    """Mean negative log-likelihood of these tokens, of each corpus with tokens in the step."""


@dataclass(frozen=True)
class SkippedReport(StepReport):
    """A step that the guard refused: no weight has changed, and its tokens do not count as trained on."""

    kind: ClassVar[str] = "skipped"


@dataclass(frozen=True)
class EvalReport:
    """The loss on a bounded part of a split, over all ranks."""

    kind: str = field(default="eval", kw_only=True)

    step: int
    split: str
    tokens: int
    loss_nats: float
    bits_per_byte: float
    loss_by_block: Sequence[float]
    """Nats per token by position in the sequence, one value per block; NaN for a block without valid tokens."""
    time_s: float

    def about(self) -> str:
        """Return text that says what was evaluated."""
        return f"{self.split}, {self.tokens:,} tokens"

    @property
    def averaged(self) -> bool:
        """Whether the averaged weights were evaluated."""
        return self.kind == OF_AVERAGE

    def of_average(self) -> Self:
        """Return the same report as one of the averaged weights."""
        return replace(self, kind=OF_AVERAGE)


@dataclass(frozen=True)
class CorpusReport(EvalReport):
    """The same on one of the additional corpora (evaluation.corpora); `split` is the corpus's name."""

    kind: str = field(default="corpus", kw_only=True)

    loss_nats_standard_error: float
    """Standard error over sequences; NaN for fewer than two."""

    def about(self) -> str:
        return f"{self.split} (± {self.loss_nats_standard_error:.4f}), {self.tokens:,} tokens"


@dataclass(frozen=True)
class PerformanceReport:
    """Time, communication and memory of a step, over all ranks, since the previous report."""

    kind: ClassVar[str] = "performance"

    step: int
    seconds: dict[str, float]
    """Seconds per step by phase, mean over the ranks. Evaluations and checkpoints, with their communication, are
    divided among the steps."""
    sent_bytes: dict[str, float]
    """Bytes per step by kind of exchange, of the rank that sends most; evaluations are divided among the steps."""
    memory_bytes: int
    """Peak memory so far, of the rank that has most: of its accelerator, or of the process if it has none."""
    memory_rank: int
    work_s: float
    """Seconds of own work per step, without waiting for other ranks; median over the ranks (the lower of two)."""
    slowest_rank: int
    slowest_host: str
    slowest_ratio: float
    """Own work of the slowest rank divided by that of the median rank."""


@dataclass(frozen=True)
class ProbeReport:
    """Results of the probes after a step."""

    step: int
    scalars: dict[str, float]
    powers_of_ten: dict[str, Tensor]
    """For histograms: many values each, as decimal logarithms."""
    sample: str | None
    """Generated text, as Markdown."""


Report = StepReport | EvalReport | PerformanceReport


class Writer:
    """Base class for a destination of reports. Only rank 0 has writers."""

    path = Path("standard output")
    """Destination, for error messages."""

    def write(self, report: Report) -> None:
        """Write one report."""

    def write_probes(self, report: ProbeReport) -> None:
        """Write the results of probes; by default nothing."""

    def close(self) -> None:
        """Close the writer: no report follows."""


class MetricsFile(Writer):
    """Writer of `metrics.jsonl`: one JSON object per line with its kind, each step once."""

    def __init__(self, run_dir: Path, start_step: int):
        """Continue after `start_step`. Lines of later steps, written before a resume, move to metrics.dropped.jsonl."""
        self.path = path = run_dir / FILE
        lines = read_lines(path)
        kept = [line for line in lines if line["step"] <= start_step]
        keep_dropped(path, [line for line in lines if line["step"] > start_step])
        with atomic_file(path) as file:
            file.writelines(json.dumps(line).encode() + b"\n" for line in kept)
        self._file = path.open("a", buffering=1, encoding="utf-8")

    def write(self, report: Report) -> None:
        with path_in_errors(self.path):  # an error of a file system is not a fault of the program
            self._file.write(json.dumps({"kind": report.kind, **asdict(report)}) + "\n")

    def close(self) -> None:
        self._file.close()


def nats_per_token(nats: float, tokens: float) -> float:
    """Return a sum of negative log-likelihoods per token; NaN without tokens, because 0 would be a perfect loss."""
    return nats / tokens if tokens else nan


def bits_per_byte(nats: float, text_bytes: float) -> float:
    """Return a sum of negative log-likelihoods in nats as bits per byte of text; NaN if there are no bytes."""
    return nats / log(2) / text_bytes if text_bytes else nan
