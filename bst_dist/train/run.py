"""One run from start to end, as every rank executes it. The methods of `Run` are in the order in which they run."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from bst_dist.checkpoint import rng
from bst_dist.checkpoint.agreement import each_or_raise, of_first
from bst_dist.checkpoint.callbacks import Checkpoints, Evaluated
from bst_dist.checkpoint.fragments import EngineState
from bst_dist.checkpoint.local.copies import open_copies
from bst_dist.checkpoint.snapshot import Position, Snapshots
from bst_dist.config import Recipe
from bst_dist.faults.disks import Disks
from bst_dist.faults.ending import LAST_WORD
from bst_dist.faults.guard import DivergedError, RollBack
from bst_dist.faults.heartbeats import shared_board
from bst_dist.faults.lease import SharedLease, shared_lease
from bst_dist.faults.signals import Notice, Stop
from bst_dist.faults.status import DONE, RESUBMIT
from bst_dist.faults.watchdog import Watchdog
from bst_dist.parallel.ranks import Ranks
from bst_dist.plan.hardware import device_name
from bst_dist.report.callback import Callback, Log
from bst_dist.report.metrics import Writer
from bst_dist.report.out_of_memory import record_history, snapshot_when_out_of_memory
from bst_dist.report.performance import Performance
from bst_dist.report.probes import Probes
from bst_dist.report.profiling import Profile
from bst_dist.train import rundir
from bst_dist.train.average import Average
from bst_dist.train.building import build_engine, build_trainer, compiles, fuses_loss, identity_of, recorded_group
from bst_dist.train.evaluation import Evaluate, Evaluations
from bst_dist.train.objective import Batches
from bst_dist.train.reporting import header, outcome_of, probes_of, writers_of
from bst_dist.train.schedule import constant_until
from bst_dist.train.start.deterministic import make_deterministic
from bst_dist.train.start.host_memory import warn_of_shortage
from bst_dist.train.start.initial_weights import uses_initial_weights
from bst_dist.train.start.request import Request, Start, load, resolve_together
from bst_dist.train.start.resuming import begin_at, changed_at, guard_of, roll_back
from bst_dist.train.start.same_start import require_same
from bst_dist.train.tf32 import products_in_tf32


def train(request: Request, ranks: Ranks, notice: Notice | None = None, disks: Disks | None = None) -> int:
    """Train from the newest valid checkpoint, or from step 0, to the requested step; return the exit status.

    `notice`: holds the signal that this process received, if any. A signal to any rank ends the training of all ranks
    with a checkpoint, and the status is RESUBMIT. `disks`: receives the run's directories. Raises UserError on every
    rank when the run cannot start, and when it diverges.
    """
    recipe = load(request)
    if recipe.deterministic:
        make_deterministic()
    with products_in_tf32(recipe.train.precision == "bf16"):
        return _train(recipe, request, ranks, notice, disks or Disks())


def _train(recipe: Recipe, request: Request, ranks: Ranks, notice: Notice | None, disks: Disks) -> int:
    start = resolve_together(recipe, request, ranks)  # every rank has checked the run directory before rank 0 writes
    require_same(start, request, ranks)
    disks.add([start.run_dir], [Path(url) for url in start.recipe.data.urls() if "://" not in url])
    board = shared_board(ranks.world)
    with (
        Watchdog(start.recipe.watchdog, start.run_dir, ranks.rank, ranks.world, ranks.phases, board, disks),
        shared_lease(ranks, start.run_dir) as lease,
        snapshot_when_out_of_memory(start.run_dir, ranks.rank),
    ):
        if start.recipe.log.memory_history:
            record_history()
        warn_of_shortage(start)
        return Run(start, request, ranks, Stop(ranks, notice), lease).train()


class Run:
    """One run on one rank. Every rank makes every call, in the same order."""

    def __init__(self, start: Start, request: Request, ranks: Ranks, stop: Stop, lease: SharedLease) -> None:
        """Build the DeepSpeed engine, the trainer, and the objects that save checkpoints and local copies."""
        self.start, self.request, self.ranks, self.stop, self.recipe = start, request, ranks, stop, start.recipe
        stage = start.completed["zero_optimization"]["stage"]
        compiled, why_not = compiles(self.recipe, ranks.device.type, stage)
        self.compiled = why_not or "yes"
        """Whether layers are compiled, for the header."""
        fused_loss = fuses_loss(self.recipe, ranks.device.type)
        # Each rank's own view of the directory could decide otherwise, and loading takes collectives.
        self.initial = of_first(ranks, lambda: uses_initial_weights(start, request.from_zero))
        """Whether the model was built with the recipe's initial weights."""
        self.engine = build_engine(start, ranks, compiled, fused_loss, self.initial)
        identity = identity_of(start, self.engine, ranks)
        averaged = self.recipe.train.average
        state = EngineState(self.engine.deepspeed, averaged is not None)
        self.average = None if averaged is None else Average(averaged, state)
        self.snapshots = Snapshots(
            start.run_dir,
            state,
            ranks,
            identity,
            self.recipe.checkpoint,
            lease=lease,
            averaged=averaged is not None,
            constant_until=constant_until(self.recipe.schedule, self.recipe.train.steps),
        )
        self.copies = open_copies(start.run_dir, self.snapshots, ranks, lease.epoch, request.resume)
        self.trainer = build_trainer(start, self.engine, ranks, recorded_group(start, ranks), stop)
        ranks.limit_exchanges(self.recipe.watchdog.exchange_limit_s)
        # After all ranks have built the same model. Loading a checkpoint sets the generators again.
        rng.seed_all(self.recipe.seed, ranks.rank)

    def train(self) -> int:
        """Take all steps, continuing from an earlier checkpoint after each roll-back; return the exit status."""
        position, local = begin_at(self.request, self.start, self.snapshots, self.copies, self.ranks, self.initial)
        self.snapshots.rehearse()
        if self.copies:
            position = self.copies.begin(position, self.start.until)
        self._announce(position, local)
        try:
            rolled_back = self._train_from(position, local)
            while rolled_back is not None:
                rolled_back = self._train_from(rolled_back)
        except DivergedError as error:
            self._close_diverged(error)
            raise
        return self._end()

    def _announce(self, position: Position, local: str | None) -> None:
        """Write the recipe, the DeepSpeed JSON and the environment of this start, and print the header.

        `local`: the local copies that the run was resumed from; None for a checkpoint or a new run.
        """
        objective, steps = self.start.objective, self.recipe.train.steps + position.skipped
        reading, tokenizer = each_or_raise(
            self.ranks,
            lambda: (
                objective.reading(self.start.mesh(self.ranks), position.data, steps),
                objective.tokenizer() if self.ranks.first else None,
            ),
        )
        hosts = sorted(set(self.ranks.all_gather_object(socket.gethostname())))
        if self.ranks.first:
            about = {"ranks": self.ranks.world, "hosts": hosts, "device": device_name(self.ranks.device)}
            about |= {"from_step": position.step} | objective.about()
            about |= {rundir.FROM_COPIES: local} if local else {}
            rundir.prepare(self.start.run_dir, self.recipe, self.start.completed, about, tokenizer)
            start = replace(self.start, changed=changed_at(self.start, position))
            copies = self.copies.describe() if self.copies else ""
            print(header(start, self.engine, self.ranks, self.compiled, copies, reading), flush=True)

    def _train_from(self, position: Position, local: str | None = None) -> Position | None:
        """Take steps from `position` on. Return None at the end, or the position to continue from after a roll-back.

        `local`: the local copies that `position` is from; None for a checkpoint or a new run.
        """
        start, trainer, ranks = self.start, self.trainer, self.ranks
        evaluated = Evaluated(self.recipe.checkpoint.keep_best_on)
        writers = [*writers_of(start, self.engine, ranks, position.step), evaluated] if ranks.first else []
        # After the writers: they drop metrics of later steps, and the guard reads the losses from what is left.
        trainer.start_from(position, guard_of(start, ranks, position, local))
        loader = start.objective.loader(start.mesh(ranks), position.step + position.skipped)
        if position.data:
            loader.load_state_dict(position.data)
        evaluate = self._evaluate(writers)
        callbacks = self._callbacks(position, loader, writers, evaluate, evaluated)
        try:
            if ranks.broadcast_object(ranks.first and evaluate.missed(start.reported(), position.step)):
                evaluate.evaluate_and_report(position.step)
            if position.step < start.until:
                if self.stop.poll():
                    self._stop_between_steps(callbacks)
                else:
                    self._take_steps(loader, callbacks)
            return None
        except RollBack as back:
            read = loader.state_dict(back.entry.data_step)
            return roll_back(start, self.snapshots, self.copies, trainer, back.entry, read)
        finally:
            loader.close()
            for writer in writers:
                with suppress(OSError):  # a full disk was already reported
                    writer.close()

    def _evaluate(self, writers: Sequence[Writer]) -> Evaluate:
        """Return the callback that evaluates the model and passes the results to `writers`."""
        recipe, context = self.recipe, self.trainer.context

        def opened() -> tuple[Evaluations, Probes | None]:
            evaluations = self.start.objective.evaluations(context)
            if not (recipe.log.tensorboard or recipe.log.writers):
                return evaluations, None
            return evaluations, probes_of(self.start, context, evaluations.validation, writers)

        # A signal or an error ends the reading of the validation data on some ranks only.
        evaluations, probes = each_or_raise(self.ranks, opened)
        return Evaluate(recipe.evaluation, recipe.train.steps, evaluations, writers, self.average, probes)

    def _callbacks(
        self, position: Position, loader: Batches, writers: Sequence[Writer], evaluate: Evaluate, evaluated: Evaluated
    ) -> list[Callback]:
        """Return the callbacks that run after each step, in this order."""
        recipe, ranks = self.recipe, self.ranks

        def data_state(step: int) -> dict[str, Any]:
            return loader.state_dict(step + position.skipped)

        # Checkpoints come after the evaluation: they store its loss (from `evaluated`) for checkpoint.keep_best.
        unsaved = position.step if self.copies and self.copies.ahead() else None
        checkpoints = Checkpoints(
            recipe.checkpoint, self.snapshots, self.trainer, evaluated, data_state, ranks.print_first, unsaved
        )
        settle, take = self.copies.callbacks(checkpoints.position, evaluated) if self.copies else ([], [])
        callbacks: list[Callback] = [
            *([self.average] if self.average else []),  # before every callback that reads the average
            *settle,  # the local copy of an earlier step must be complete before this step is reported
            Log(writers),  # before evaluation and checkpoint: when they fail, the step has been reported
            evaluate,
            *take,
            checkpoints,
            # Measures the time of the others.
            Performance(recipe.log.every, ranks, writers, self.trainer.context.sharing, position.step),
        ]
        if recipe.log.profile:
            profile = Profile(recipe.log.profile, self.start.run_dir, ranks.rank, position.step, ranks.print_first)
            callbacks.append(profile)  # last: so a profiled step includes all other callbacks
        return callbacks

    def _take_steps(self, loader: Batches, callbacks: Sequence[Callback]) -> None:
        """Run the training loop until `start.until` steps are done in total, or the ranks have agreed to stop."""
        phases, until = self.ranks.phases, self.start.until
        began = time.perf_counter()
        phases.enter("data")
        for data_step, batches in loader:
            waited = time.perf_counter() - began
            report = self.trainer.step(data_step - self.trainer.skipped, batches, began)
            if report is None:
                self._stop_between_steps(callbacks)
                return
            report = replace(report, data_wait_s=waited)
            for callback in callbacks:
                phases.enter(callback.phase)
                # Evaluated for each callback: the ranks may agree to stop while a callback runs.
                callback.after_step(report, last=self.stop.stopping or report.step == until)
            if self.stop.stopping or report.step == until:
                return
            began = time.perf_counter()
            phases.enter("data", report.step + 1)

    def _stop_between_steps(self, callbacks: Sequence[Callback]) -> None:
        for callback in callbacks:
            self.ranks.phases.enter(callback.phase)
            callback.after_interruption()

    def _close_diverged(self, error: DivergedError) -> None:
        """Write outcome.json of a run that the guard stops, and keep the checkpoints of the steps before."""
        self.snapshots.finish_and_tell()  # the checkpoint being written is from before the divergence
        if self.copies:
            self.copies.drop()
            self.copies.remove()
        if self.ranks.first:
            rundir.finish(self.start.run_dir, {"finished": False, "diverged": str(error)})
        self.ranks.barrier()  # all ranks diverge together; the launcher may kill the others once rank 0 has exited

    def _end(self) -> int:
        """Write outcome.json and return the exit status, which is the same on all ranks."""
        ranks = self.ranks
        outcome = ranks.broadcast_object(
            outcome_of(self.start.reported(), self.recipe.train.steps, self.start.objective.evaluates)
            if ranks.first
            else None
        )
        told = [signal for signal in ranks.all_gather_object(self.stop.notice.signal) if signal is not None]
        stopped = self.stop.stopping and not outcome["finished"]
        if stopped:
            outcome |= {"stopped": told[0].name}
        if not (stopped and LAST_WORD in os.environ):  # else the launcher reports the signal
            ranks.print_first(rundir.closing(outcome, self.recipe.train.steps, self.start.until))
        if ranks.first:
            rundir.finish(self.start.run_dir, outcome)
        if self.copies:
            self.copies.remove()
        ranks.barrier()  # once rank 0 has exited, its launcher may kill the others
        return RESUBMIT if stopped else DONE
