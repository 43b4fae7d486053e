"""Takes checkpoints while a run trains: what is called after each step, and the loss that a checkpoint stores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from bst_base.errors import StorageError
from bst_dist.checkpoint.config import CheckpointConfig
from bst_dist.checkpoint.directory import step_of
from bst_dist.checkpoint.saving import Failed, Saved
from bst_dist.checkpoint.snapshot import Position, Snapshots
from bst_dist.report.callback import Callback
from bst_dist.report.metrics import EvalReport, Report, StepReport, Writer


class Evaluated(Writer):
    """A writer that remembers the last evaluation; only rank 0's receives reports."""

    def __init__(self, on: str = "validation") -> None:
        """`on`: the split whose loss counts (checkpoint.keep_best_on)."""
        self.on = on
        self._last: EvalReport | None = None

    def write(self, report: Report) -> None:
        if isinstance(report, EvalReport) and not report.averaged and report.split == self.on:
            self._last = report

    def loss(self, step: int) -> float | None:
        """Return the validation loss in nats after `step` steps; None if it was not evaluated there."""
        return self._last.loss_nats if self._last and self._last.step == step else None


class Progress(Protocol):
    """The progress of the run (`train.step.Trainer`)."""

    tokens: int
    """Valid tokens trained on so far, over all ranks."""
    carried: list[Any]
    """The past carried to the next step, one entry per micro-batch."""
    skipped: int
    """Number of steps whose data was skipped by roll-backs."""


class Checkpoints(Callback):
    """Takes checkpoints at the configured steps and after the last step."""

    phase = "checkpoint"

    def __init__(
        self,
        config: CheckpointConfig,
        snapshots: Snapshots,
        trainer: Progress,
        evaluated: Evaluated,
        data_state: Callable[[int], dict[str, Any]],
        say: Callable[[str], None],
        unsaved: int | None = None,
    ) -> None:
        """`evaluated`: holds the last validation loss. `data_state`: returns the loader's state after a number of
        steps. `say`: prints a message. `unsaved`: the step that the run resumed from, if no checkpoint is as new: that
        of local copies."""
        self.config, self.snapshots, self.trainer, self.evaluated = config, snapshots, trainer, evaluated
        self.data_state, self.say = data_state, say
        self._step = unsaved
        """The last training step that was taken; before the first `unsaved`."""
        self._full: int | None = None
        """The step of the last full checkpoint that was committed."""

    def after_step(self, report: StepReport, last: bool) -> None:
        """Commit the pending checkpoint if it is written, and begin the one that is due; after the last step, wait.

        When a checkpoint cannot be written, a message is printed and the run continues; the previous checkpoint is
        unchanged. Raises StorageError on all ranks when the last checkpoint fails, or `checkpoint.failures` in a row.
        """
        self._step = report.step
        self._tell(self.snapshots.poll())
        if last or self.config.wanted(report.step):
            full = last or self.config.scheduled(report.step)
            self._tell(self.snapshots.finish())
            loss = self.evaluated.loss(report.step)
            self._tell(self.snapshots.start(self.position(report.step), loss, full), last)
            if last or not self.config.background:
                self._tell(self.snapshots.finish(), last)

    def after_interruption(self) -> None:
        """Commit the pending checkpoint, and take a full one of the last step unless there is one.

        Without a new step that is the step of the local copies that the run resumed from: they are removed when this
        start ends, and other nodes do not have them.
        """
        self._tell(self.snapshots.finish())
        if self._step is not None and self._full != self._step:
            loss = self.evaluated.loss(self._step)
            self._tell(self.snapshots.start(self.position(self._step), loss), last=True)
            self._tell(self.snapshots.finish(), last=True)

    def position(self, step: int) -> Position:
        """Return the position of the run after `step` steps."""
        trainer = self.trainer
        return Position(step, trainer.tokens, self.data_state(step), trainer.carried, trainer.skipped)

    def _tell(self, outcome: Saved | Failed | None, last: bool = False) -> None:
        if isinstance(outcome, Failed):
            if last:
                raise StorageError(str(outcome))
            if (failed := self.snapshots.failed) >= self.config.failures:
                raise StorageError(f"{outcome}\nthe run stops: {failed} in a row (checkpoint.failures)")
            self.say(f"{outcome}\n{'':>12} the run continues; earlier checkpoints are unchanged")
        elif outcome:
            self._full = step_of(outcome.path) if outcome.full else self._full
            kind = "checkpoint" if outcome.full else "weights"
            self.say(f"{'':>12} {kind} {outcome.path}: {outcome.bytes / 1e6:,.1f} MB in {outcome.seconds:.1f} s")
