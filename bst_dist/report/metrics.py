"""What a run reports: lines on the console and in `metrics.jsonl`; for TensorBoard see `tensorboard.py`."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from math import log, nan
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, ClassVar

from bst_base.errors import StorageError
from bst_base.files import atomic_file

if TYPE_CHECKING:
    from torch import Tensor

FILE = "metrics.jsonl"


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
    """The same loss by the bytes of text that the labels stand for."""
    gradient_norm: float
    """Global norm before clipping."""
    learning_rate: float
    """Rate of the matrices and vectors in this step."""
    ssm_learning_rate: float
    """Rate of the SSM dynamics in this step."""
    step_time_s: float
    tokens_per_s: float
    mfu: float
    """Model FLOPs utilisation: the model's own arithmetic as a share of the ranks' peak; nan where none is known."""
    hfu: float = 0.0
    """Hardware FLOPs utilisation: recomputation in the backward pass included."""
    data_wait_s: float = 0.0
    """What the first rank waited for its batches, as a part of the step's time."""
    z_loss: float = 0.0
    """What was minimised beside the loss: train.z_loss times the mean of log^2 Z; 0 without."""


@dataclass(frozen=True)
class MixedReport(StepReport):
    """The same of a step on several corpora, by their names."""

    tokens_by_corpus: dict[str, int] = field(default_factory=dict)
    """Valid tokens of the step."""
    loss_by_corpus: dict[str, float] = field(default_factory=dict)
    """Their mean negative log-likelihood, of the corpora that have any in the step."""


@dataclass(frozen=True)
class SkippedReport(StepReport):
    """A step that the guard held back: no weight has changed, and nothing was trained on."""

    kind: ClassVar[str] = "skipped"


@dataclass(frozen=True)
class EvalReport:
    """The loss on a bounded part of a split, over all ranks."""

    kind: ClassVar[str] = "eval"

    step: int
    split: str
    tokens: int
    loss_nats: float
    bits_per_byte: float
    loss_by_block: Sequence[float]
    """Nats per token by position in the sequence, one value per block."""
    time_s: float

    def about(self) -> str:
        """What was evaluated, for people."""
        return f"{self.split}, {self.tokens:,} tokens"


@dataclass(frozen=True)
class CorpusReport(EvalReport):
    """The same on one of the further corpora (evaluation.corpora), whose name is the split's."""

    kind: ClassVar[str] = "corpus"

    loss_nats_standard_error: float
    """Over sequences; nan for fewer than two."""

    def about(self) -> str:
        return f"{self.split} (± {self.loss_nats_standard_error:.4f}), {self.tokens:,} tokens"


@cache
def _averaged(of: type[EvalReport]) -> type[EvalReport]:
    class Averaged(of):
        kind: ClassVar[str] = "averaged"

        def about(self) -> str:
            return f"averaged weights: {super().about()}"

    return Averaged


def of_average(report: EvalReport) -> EvalReport:
    """The same report, of whatever kind of evaluation, about the averaged weights (train.average): other readers of
    metrics.jsonl do not take it for one about the weights."""
    return _averaged(type(report))(**vars(report))


def curve_group(line: dict[str, Any]) -> str:
    """What the names of a report's curves begin with, in TensorBoard and other writers; `line` is that of FILE."""
    if "split" not in line:
        return line["kind"]
    further = "loss_nats_standard_error" in line  # a CorpusReport, or one of averaged weights
    name = f"validation {line['split']}" if further else line["split"]
    return f"{name} averaged" if line["kind"] == "averaged" else name


@dataclass(frozen=True)
class PerformanceReport:
    """Where the time of a step goes, over all ranks, since the report before."""

    kind: ClassVar[str] = "performance"

    step: int
    seconds: dict[str, float]
    """Of a step by phase, the mean over the ranks; evaluations and checkpoints spread over the steps between."""
    sent_bytes: dict[str, float]
    """In a step by kind of exchange, by the rank that sends most of it; evaluations are spread over the steps."""
    memory_bytes: int
    """The most that any rank has held so far: on its accelerator, or in all where there is none."""
    memory_rank: int
    work_s: float
    """The median rank's own work in a step, without waiting for others."""
    slowest_rank: int
    slowest_host: str
    slowest_ratio: float
    """The slowest rank's own work by the median rank's."""


@dataclass(frozen=True)
class Seen:
    """What the probes saw after a step."""

    step: int
    scalars: dict[str, float]
    powers_of_ten: dict[str, Tensor]
    """Many values each, as their decimal logarithms."""
    sample: str | None
    """Markdown."""


Report = StepReport | EvalReport | PerformanceReport


class Callback:
    """A concern beside the training itself, on every rank."""

    phase: ClassVar[str] = "report"
    """What its time goes down as."""

    def after_step(self, report: StepReport, last: bool) -> None:
        """Called after each step; `last` when none follows in this start."""

    def ended(self) -> None:
        """Called when no step follows although the one before was not the `last`: there was no data for it."""


class Writer:
    """Somewhere that reports go to; rank 0 has several, the others none."""

    path = Path("standard output")
    """Where that is."""

    def write(self, report: Report) -> None:
        """Take in one report."""

    def see(self, seen: Seen) -> None:
        """Take in what probes saw; most have no place for it."""

    def close(self) -> None:
        """Nothing more will come."""


class Log(Callback):
    """Hands each step's report to the writers; raises StorageError when one cannot write."""

    def __init__(self, writers: Sequence[Writer]):
        self.writers = writers

    def after_step(self, report: StepReport, last: bool) -> None:
        for writer in self.writers:
            try:
                writer.write(report)
            except OSError as error:
                raise StorageError.of(error, writer.path, doing="write") from None


class MetricsFile(Writer):
    """`metrics.jsonl`: one JSON object a line, each naming its kind; always the lines of one run."""

    def __init__(self, run_dir: Path, start_step: int):
        """Go on after `start_step`: lines of later steps, from before a resume, go to metrics.dropped.jsonl."""
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
    """The complete lines of a metrics file; the last may have been cut by a kill, and is then left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def dropped(path: Path) -> Path:
    """Where lines go that leave `path`, a file of JSON Lines."""
    return path.with_suffix(f".dropped{path.suffix}")


def keep_dropped(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Append lines that are about to leave `path`, a file of JSON Lines, to its neighbour for such lines."""
    if not lines:
        return
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    with dropped(path).open("ab") as file:
        file.writelines(json.dumps({**line, "dropped": when}).encode() + b"\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())


class Console(Writer):
    """A line every `every` steps, with the time left; a separate line for each evaluation."""

    def __init__(self, every: int, steps: int, straggler: float = math.inf, utilisation: bool = True):
        """`utilisation`: show MFU; a CPU has no known peak."""
        self.every, self.steps, self.straggler, self.utilisation = every, steps, straggler, utilisation
        self._since: list[StepReport] = []
        self._slow: int | None = None
        self._started = True  # the first step has a line of its own: it is slower, and shows that the run moves

    @staticmethod
    def header(labels: str = "tokens", utilisation: bool = True) -> str:
        """The heads of the columns; `labels`: what is counted."""
        mfu = f" {'MFU':>6}" if utilisation else ""
        return f"{'step':>12} {'loss':>8} {'bits/byte':>9} {'norm':>8} {'rate':>9} {labels + '/s':>9}{mfu} {'left':>8}"

    def write(self, report: Report) -> None:
        if isinstance(report, EvalReport):
            print(f"{report.step:>12} {report.loss_nats:>8.4f} {_bits(report)}  {report.about()} in "
                  f"{report.time_s:.1f} s", flush=True)  # fmt: skip
            return
        if isinstance(report, SkippedReport):
            print(f"{report.step:>6}/{self.steps:<5} {report.loss_nats:>8.4f} {_bits(report)} "
                  f"{report.gradient_norm:>8.3f}  skipped: see ledger.jsonl", flush=True)  # fmt: skip
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
        """Where the time goes, once it has settled and at the end; a rank that is slow in two reports running."""
        if report.step in (2 * self.every, self.steps):
            print(f"{'':>12} {_performance(report)}", flush=True)
        slow = report.slowest_rank if report.slowest_ratio > self.straggler else None
        if slow is not None and slow == self._slow:
            who = f"rank {report.slowest_rank} on {report.slowest_host}"
            print(f"{'':>12} {who} is slow: its own work in a step takes {report.slowest_ratio:.2f} times "
                  f"the median rank's {report.work_s:.3g} s", flush=True)  # fmt: skip
        self._slow = slow

    def _line(self, last: StepReport) -> str:
        """The mean of the speeds since the last line; the loss, norm and rate of the last step."""
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
    """Bits per byte for people, blank where labels are no text."""
    return " " * 9 if math.isnan(report.bits_per_byte) else f"{report.bits_per_byte:>9.4f}"


def _performance(report: PerformanceReport) -> str:
    """Shares of the time, bytes and memory, in a line for people."""
    total = sum(report.seconds.values()) or 1.0
    spent = sorted(report.seconds.items(), key=lambda item: -item[1])
    shares = ", ".join(f"{phase} {seconds / total:.0%}" for phase, seconds in spent if seconds / total >= 0.005)
    sent = sum(report.sent_bytes.values())
    return f"{shares}; {sent / 1e6:,.1f} MB sent per step; {report.memory_bytes / 2**30:,.2f} GiB of memory"


def duration(seconds: float) -> str:
    """Seconds as people read them: 42s, 3m 05s, 2h 07m, 3d 04h."""
    seconds = round(seconds)
    for unit, below, size, part in (("d", "h", 86400, 3600), ("h", "m", 3600, 60), ("m", "s", 60, 1)):
        if seconds >= size:
            return f"{seconds // size}{unit} {seconds % size // part:02}{below}"
    return f"{seconds}s"


def _harmonic(speeds: Sequence[float]) -> float:
    """The mean of speeds over equal amounts of work."""
    return len(speeds) / sum(1 / speed for speed in speeds) if all(speeds) else 0.0


def bits_per_byte(nats: float, text_bytes: float) -> float:
    """A sum of negative log-likelihoods by the bytes of text it is about; nan when there are none."""
    return nats / log(2) / text_bytes if text_bytes else nan
