"""Reports of a run, and two of their writers: the console and `metrics.jsonl`. For TensorBoard see `tensorboard.py`."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from math import log, nan
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, ClassVar, Self

from bst_base.clock import utc_now
from bst_base.errors import StorageError
from bst_base.files import atomic_file

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


def curve_group(line: dict[str, Any]) -> str:
    """Return the prefix of the names of a report's curves, in TensorBoard and other writers; `line`: a line of FILE."""
    if "split" not in line:
        return line["kind"]
    further = "loss_nats_standard_error" in line  # a CorpusReport, or one of averaged weights
    name = f"validation {line['split']}" if further else line["split"]
    return f"{name} averaged" if line["kind"] == OF_AVERAGE else name


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
class Seen:
    """Results of the probes after a step."""

    step: int
    scalars: dict[str, float]
    powers_of_ten: dict[str, Tensor]
    """For histograms: many values each, as decimal logarithms."""
    sample: str | None
    """Generated text, as Markdown."""


Report = StepReport | EvalReport | PerformanceReport


class Callback:
    """Base class for code that runs on every rank after each step."""

    phase: ClassVar[str] = "report"
    """Phase that its time is reported under."""

    def after_step(self, report: StepReport, last: bool) -> None:
        """Called after each step; `last`: no step follows in this start."""

    def ended(self) -> None:
        """Called when training ends without a `last` step because there was no more data."""


class Writer:
    """Base class for a destination of reports. Only rank 0 has writers."""

    path = Path("standard output")
    """Destination, for error messages."""

    def write(self, report: Report) -> None:
        """Write one report."""

    def see(self, seen: Seen) -> None:
        """Write the results of probes; by default nothing."""

    def close(self) -> None:
        """Close the writer: no report follows."""


class Log(Callback):
    """Passes each step's report to the writers. Raises StorageError if one cannot write."""

    def __init__(self, writers: Sequence[Writer]):
        self.writers = writers

    def after_step(self, report: StepReport, last: bool) -> None:
        for writer in self.writers:
            try:
                writer.write(report)
            except OSError as error:
                raise StorageError.of(error, writer.path, doing="write") from None


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
        self._file.write(json.dumps({"kind": report.kind, **asdict(report)}) + "\n")

    def close(self) -> None:
        self._file.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the complete lines of a JSON Lines file. An incomplete last line, after a kill, is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def dropped(path: Path) -> Path:
    """Return the file that receives lines dropped from `path`, a JSON Lines file."""
    return path.with_suffix(f".dropped{path.suffix}")


def keep_dropped(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Append `lines`, which are about to be removed from the JSON Lines file `path`, to its file of dropped lines."""
    if not lines:
        return
    when = utc_now()
    with dropped(path).open("ab") as file:
        file.writelines(json.dumps({**line, "dropped": when}).encode() + b"\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())


class Console(Writer):
    """Writer that prints a line every `every` steps, with the time left, and a line for each evaluation."""

    def __init__(self, every: int, steps: int, straggler: float = math.inf, utilisation: bool = True):
        """`straggler`: as `log.straggler`. `utilisation`: show MFU; False on a CPU, which has no known peak."""
        self.every, self.steps, self.straggler, self.utilisation = every, steps, straggler, utilisation
        self._since: list[StepReport] = []
        self._slow: int | None = None
        self._started = True  # print the first step alone: it is slower, and it shows that training has begun

    @staticmethod
    def header(labels: str = "tokens", utilisation: bool = True) -> str:
        """Return the column headers; `labels`: name of what is counted, such as tokens."""
        mfu = f" {'MFU':>6}" if utilisation else ""
        return f"{'step':>12} {'loss':>8} {'bits/byte':>9} {'norm':>8} {'rate':>9} {labels + '/s':>9}{mfu} {'left':>8}"

    def write(self, report: Report) -> None:
        if isinstance(report, EvalReport):
            weights = "averaged weights: " if report.averaged else ""
            print(
                f"{report.step:>12} {report.loss_nats:>8.4f} {_bits(report)}  {weights}{report.about()} in "
                f"{report.time_s:.1f} s",
                flush=True,
            )
            return
        if isinstance(report, SkippedReport):
            print(
                f"{report.step:>6}/{self.steps:<5} {report.loss_nats:>8.4f} {_bits(report)} "
                f"{report.gradient_norm:>8.3f}  skipped: see ledger.jsonl",
                flush=True,
            )
            return
        if isinstance(report, PerformanceReport):
            self._performance(report)
            return
        self._since.append(report)
        if self._started or report.step % self.every == 0 or report.step == self.steps:
            print(self._line(report), flush=True)
            self._since.clear()
            self._started = False

    def _performance(self, report: PerformanceReport) -> None:
        """Print where the time goes, once early in the run and at the end; and a rank that is slow in two reports in a
        row."""
        if report.step in (2 * self.every, self.steps):
            print(f"{'':>12} {_performance(report)}", flush=True)
        slow = report.slowest_rank if report.slowest_ratio > self.straggler else None
        if slow is not None and slow == self._slow:
            who = f"rank {report.slowest_rank} on {report.slowest_host}"
            print(
                f"{'':>12} {who} is slow: its own work in a step takes {report.slowest_ratio:.2f} times "
                f"the median rank's {report.work_s:.3g} s",
                flush=True,
            )
        self._slow = slow

    def _line(self, last: StepReport) -> str:
        """Return the line of a step: loss, norm and rate of this step, mean speed since the previous line."""
        left = (self.steps - last.step) * median(report.step_time_s for report in self._since)
        speed = _harmonic([report.tokens_per_s for report in self._since])
        return (
            f"{last.step:>6}/{self.steps:<5} {last.loss_nats:>8.4f} {_bits(last)} "
            f"{last.gradient_norm:>8.3f} {last.learning_rate:>9.2e} {speed:>9,.0f}{self._mfu()} {duration(left):>8}"
        )

    def _mfu(self) -> str:
        if not self.utilisation:
            return ""
        mfu = _harmonic([report.mfu for report in self._since])
        return f" {'-':>6}" if math.isnan(mfu) else f" {mfu:>6.1%}"


def _bits(report: StepReport | EvalReport) -> str:
    """Format bits per byte; blank if labels are no text."""
    return " " * 9 if math.isnan(report.bits_per_byte) else f"{report.bits_per_byte:>9.4f}"


def _performance(report: PerformanceReport) -> str:
    """Format a performance report as one line: shares of the time, bytes sent, memory."""
    total = sum(report.seconds.values()) or 1.0
    spent = sorted(report.seconds.items(), key=lambda item: -item[1])
    shares = ", ".join(f"{phase} {seconds / total:.0%}" for phase, seconds in spent if seconds / total >= 0.005)
    sent = sum(report.sent_bytes.values())
    return f"{shares}; {sent / 1e6:,.1f} MB sent per step; {report.memory_bytes / 2**30:,.2f} GiB of memory"


def duration(seconds: float) -> str:
    """Format seconds as 42s, 3m 05s, 2h 07m or 3d 04h."""
    seconds = round(seconds)
    for unit, below, size, part in (("d", "h", 86400, 3600), ("h", "m", 3600, 60), ("m", "s", 60, 1)):
        if seconds >= size:
            return f"{seconds // size}{unit} {seconds % size // part:02}{below}"
    return f"{seconds}s"


def _harmonic(speeds: Sequence[float]) -> float:
    """Return the harmonic mean: the mean speed over equal amounts of work; 0 if any speed is 0."""
    return len(speeds) / sum(1 / speed for speed in speeds) if all(speeds) else 0.0


def nats_per_token(nats: float, tokens: float) -> float:
    """Return a sum of negative log-likelihoods per token; NaN without tokens, because 0 would be a perfect loss."""
    return nats / tokens if tokens else nan


def bits_per_byte(nats: float, text_bytes: float) -> float:
    """Return a sum of negative log-likelihoods in nats as bits per byte of text; NaN if there are no bytes."""
    return nats / log(2) / text_bytes if text_bytes else nan
