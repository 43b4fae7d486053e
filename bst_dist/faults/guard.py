"""The guard: rejects a step whose loss or gradient is not finite, or whose loss is a spike.

Every decision depends only on data that is equal on all ranks (the losses of the steps so far, and the ledger). So all
ranks decide the same, and so does a run that was stopped and resumed. A rejected step may be *skipped*: no weight
changes, and the next step has the next data. Or the run is *rolled back*: it continues from its last scheduled
checkpoint with the data after the rejected step, and the data in between is skipped (as Chowdhery et al., arXiv
2204.02311, section 5.1, did by hand). After too many skips and roll-backs the run stops.
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
"""Standard deviation of a normal distribution, in median absolute deviations."""
LEAST = 1e-3
"""Minimum of the estimated deviation, as a fraction of the median. So a nearly constant loss has no spikes."""


class DivergedError(UserError):
    """The guard stops the run because the loss or gradient is not finite, or the loss is a spike."""


class RollBack(Exception):
    """The run must continue from an earlier checkpoint. `entry` goes to the ledger once that checkpoint is known."""

    def __init__(self, entry: Entry) -> None:
        super().__init__(entry.cause)
        self.entry = entry


class Guard:
    """Accepts or rejects each step by its loss and its gradient norm."""

    def __init__(self, config: GuardConfig, ledger: Ledger, losses: Iterable[float] = ()) -> None:
        """`losses`: of the steps taken so far, in nats; the next loss is compared with the last of them."""
        self.config, self.ledger = config, ledger
        self._losses = deque(losses, maxlen=config.spike_window)

    def loss(self, value: float, step: int, skipped: int, rate: float) -> Entry | None:
        """Check a step by its loss in nats; return None to take it, or the ledger entry with the reason and action.

        `step`: number of steps before it. `skipped`: number of steps whose data was skipped. `rate`: learning rate, for
        the error message. Raises DivergedError when the run must stop.
        """
        if not math.isfinite(value):
            return self._act(self.config.non_finite, f"the loss is {value}", step, skipped, rate)
        if value > self.limit:
            cause = f"the loss jumps to {value:.4f}, above {self.limit:.4f}"
            return self._act(self.config.spike, cause, step, skipped, rate)
        return None

    def gradient(self, norm: float, step: int, skipped: int, rate: float) -> Entry | None:
        """Check a step by its global gradient norm; otherwise as `loss`."""
        if math.isfinite(norm):
            return None
        return self._act(self.config.non_finite, f"the gradient norm is {norm}", step, skipped, rate)

    def taken(self, loss: float) -> None:
        """Record the loss of a step that was taken."""
        self._losses.append(loss)

    @property
    def limit(self) -> float:
        """The highest loss with which a step is taken.

        It is known before the step, so that the comparison can run on the device.
        """
        if self.config.spike == "ignore" or len(self._losses) < self.config.spike_window:
            return math.inf
        middle = median(self._losses)
        deviation = max(NORMAL * median(abs(loss - middle) for loss in self._losses), LEAST * abs(middle))
        return middle + self.config.spike_deviations * deviation

    def _act(self, policy: str, cause: str, step: int, skipped: int, rate: float) -> Entry:
        """Add an entry to the ledger and return it, or raise DivergedError.

        The entry of a roll-back is added later, when the checkpoint to continue from is known.
        """
        before = self.ledger.lately(step + 1 + skipped, self.config.within)
        exhausted = policy != "stop" and before >= self.config.most
        entry = Entry(step + 1, skipped, f"{cause} in step {step + 1}", "stop" if exhausted else policy)
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
