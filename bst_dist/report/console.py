"""Writer of a run's lines on the console."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import median

from bst_dist.parallel.phases import OCCASIONAL
from bst_dist.report.metrics import EvalReport, PerformanceReport, Report, SkippedReport, StepReport, Writer


class Console(Writer):
    """Writer that prints a line every `every` steps, with the time left, and a line for each evaluation."""

    def __init__(
        self,
        every: int,
        steps: int,
        tokens_after: Callable[[int], int],
        straggler: float = math.inf,
        utilisation: bool = True,
    ):
        """`tokens_after`: returns the tokens of all steps that follow the first N. `straggler`: as `log.straggler`.
        `utilisation`: show MFU; False on a CPU, which has no known peak."""
        self.every, self.steps, self.straggler, self.utilisation = every, steps, straggler, utilisation
        self._tokens_after = tokens_after
        self._in_steps = self._between = 0.0
        """Seconds in steps, and in evaluations and checkpoints, since the start; as far as they were measured."""
        self._measured: int | None = None
        """The last step whose time is in these sums; None before the first step."""
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
        if self._measured is None:
            self._measured = report.step - 1
        if self._started or report.step % self.every == 0 or report.step == self.steps:
            print(self._line(report), flush=True)
            self._since.clear()
            self._started = False

    def _performance(self, report: PerformanceReport) -> None:
        """Print where the time goes, once early in the run and at the end; and a rank that is slow in two reports in a
        row."""
        if self._measured is not None:
            steps, self._measured = report.step - self._measured, report.step
            between = sum(seconds for phase, seconds in report.seconds.items() if phase in OCCASIONAL)
            self._between += steps * between
            self._in_steps += steps * (sum(report.seconds.values()) - between)
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
        left = self._left(last.step, median(report.step_time_s for report in self._since))
        speed = _harmonic([report.tokens_per_s for report in self._since])
        return (
            f"{last.step:>6}/{self.steps:<5} {last.loss_nats:>8.4f} {_bits(last)} "
            f"{last.gradient_norm:>8.3f} {last.learning_rate:>9.2e} {speed:>9,.0f}{self._mfu()} {duration(left):>8}"
        )

    def _left(self, step: int, step_time_s: float) -> float:
        """Return the seconds left after a step: those of the remaining tokens, and of what comes between steps.

        Evaluations and checkpoints are assumed to take the same share of the time as since the start.
        """
        remaining = self._tokens_after(step)
        of_step = self._tokens_after(step - 1) - remaining
        share = self._between / self._in_steps if self._in_steps else 0.0
        return remaining / of_step * step_time_s * (1 + share)

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
