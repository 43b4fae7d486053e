"""What becomes of a step whose loss is no number, whose gradient is none, or whose loss jumps.

Every decision is a function of what all ranks know alike (the losses of the steps so far, and the ledger), so all ranks
decide the same, and so does a run that was stopped in between. A step may be *skipped*: no weight changes, and the
next step has the next data. Or the run is *rolled back*: it continues from its last checkpoint, with the data that
comes after the step in question; all data from that checkpoint to there is skipped (as Chowdhery et al., arXiv
2204.02311, section 5.1, did by hand). Either is done so often and no more: then the run stops.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from statistics import median

from bst_base.errors import UserError
from bst_dist.faults.config import GuardConfig
from bst_dist.faults.ledger import Entry, Ledger

NORMAL = 1.4826
"""Standard deviations of a normal distribution in one median absolute deviation."""
LEAST = 1e-3
"""A deviation smaller than this share of the median counts as this: a loss that barely moves has no spikes."""


class DivergedError(UserError):
    """The loss or the gradient became infinite or not a number, or jumped, and the guard's policy is to stop."""


class RollBack(Exception):
    """The run continues from its last checkpoint; `entry` is for the ledger, once it is known which that is."""

    def __init__(self, entry: Entry) -> None:
        super().__init__(entry.cause)
        self.entry = entry


class Guard:
    """Judges each step by its loss and by its gradient."""

    def __init__(self, config: GuardConfig, ledger: Ledger, losses: Iterable[float] = ()) -> None:
        """`losses`: of the steps taken so far, in nats; the last of them are what the next one is compared with."""
        self.config, self.ledger = config, ledger
        self._losses = deque(losses, maxlen=config.spike_window)

    def loss(self, value: float, step: int, skipped: int, rate: float) -> Entry | None:
        """Why the step with this loss, in nats, is not taken, and what is done; None when it is taken.

        `step` counts the steps before; `skipped` the steps of data skipped; `rate` is for the message.
        Raises DivergedError when the run is to stop.
        """
        if not math.isfinite(value):
            return self._act(self.config.non_finite, f"the loss is {value}", step, skipped, rate)
        if value > self.limit:
            cause = f"the loss jumps to {value:.4f}, above {self.limit:.4f}"
            return self._act(self.config.spike, cause, step, skipped, rate)
        return None

    def gradient(self, norm: float, step: int, skipped: int, rate: float) -> Entry | None:
        """The same by the global gradient norm."""
        if math.isfinite(norm):
            return None
        return self._act(self.config.non_finite, f"the gradient norm is {norm}", step, skipped, rate)

    def taken(self, loss: float) -> None:
        """A step was taken, with this loss."""
        self._losses.append(loss)

    @property
    def limit(self) -> float:
        """The highest loss with which a step is taken; known before the step, so that a device can compare with it."""
        if self.config.spike == "ignore" or len(self._losses) < self.config.spike_window:
            return math.inf
        middle = median(self._losses)
        deviation = max(NORMAL * median(abs(loss - middle) for loss in self._losses), LEAST * abs(middle))
        return middle + self.config.spike_deviations * deviation

    def _act(self, policy: str, cause: str, step: int, skipped: int, rate: float) -> Entry:
        """Enter what is done in the ledger; a roll-back's entry follows when it is known where to."""
        before = self.ledger.lately(step + 1 + skipped, self.config.within)
        exhausted = policy != "stop" and before >= self.config.most
        entry = Entry(step + 1, skipped, f"{cause} in step {step}", "stop" if exhausted else policy)
        if entry.action != "roll-back":
            self.ledger.add(entry)
        if entry.action != "stop":
            return entry
        many = f", and {before} such steps were already skipped within {self.config.within} (guard.most)"
        limit = many if exhausted else ""
        raise DivergedError(
            f"{entry.cause} (learning rate {rate:.3g}){limit}: that step was not taken, and the last checkpoint is "
            "from before it; start a new run with a lower optimizer.learning_rate, a longer schedule.warmup_steps or a "
            "lower train.gradient_clipping, or resume with another guard policy"
        )
