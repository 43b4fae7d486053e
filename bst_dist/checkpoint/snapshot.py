"""Take checkpoints of a run, and continue from one: exactly under the same layout, but for rounding under another."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, Protocol

import torch

from bst_base.errors import StorageError
from bst_dist.checkpoint import rng, saving
from bst_dist.checkpoint.config import CheckpointConfig
from bst_dist.checkpoint.directory import (
    AVERAGE,
    AVERAGED,
    FORMAT,
    OPTIMIZER,
    TENSORS,
    WEIGHT,
    WEIGHTS,
    CheckpointError,
    has,
    is_full,
    open_shards,
    rank_file,
    step_of,
    stored_name,
)
from bst_dist.checkpoint.fragments import Fragment
from bst_dist.checkpoint.judging import agreed_committed, judged, manifest_of
from bst_dist.checkpoint.layout import Carried, Layout, Rows, redistribute
from bst_dist.checkpoint.local_copy import LocalCopy, copied_name
from bst_dist.checkpoint.retention import set_aside, tidy
from bst_dist.checkpoint.saving import Failed, Saved, Saver
from bst_dist.checkpoint.shards import Shards
from bst_dist.faults.lease import NO_LEASE, SharedLease
from bst_dist.parallel.ranks import Ranks
from bst_dist.report.metrics import Callback, EvalReport, Report, StepReport, Writer
from bst_dist.version import versions


@dataclass(frozen=True)
class Position:
    """Where a run stands after a number of steps, on one rank."""

    step: int
    tokens: int
    """Valid tokens trained on so far, over all ranks."""
    data: dict[str, Any]
    """The loader's state: proof that a resumed run reads the same data in the same order."""
    carried: list[Any]
    """The past carried to the next step, one entry a micro-batch; empty when nothing is carried."""
    skipped: int = 0
    """Steps' worth of data skipped by rollbacks: step s trains on the data of step s + skipped."""


@dataclass(frozen=True)
class Identity:
    """What a run is, and how it lies over its ranks now."""

    recipe: str
    """Digest of what makes the recipe this run, for people."""
    groups: dict[str, Any]
    """Hyperparameters of the parameter groups, by name."""
    seed: int
    layout: Layout
    rows: Rows
    settings: dict[str, Any] = field(default_factory=dict)
    """What the recipe sets, and every checkpoint of the run has in common, by dotted names."""
    may_change: Callable[[str], bool] = lambda _: False
    """Settings that older checkpoints have among these, and that may be others from one to the next."""


class State(saving.State, Protocol):
    """The engine's memory (`fragments.EngineState`)."""

    def held(self) -> list[Fragment]:
        """All that lies on this rank, to be filled."""

    def updates(self) -> int:
        """Updates that the optimizer has made."""

    def filled(self, step: int, updates: int) -> None:
        """Let the engine continue from what was filled in."""


class Snapshots:
    """Checkpoints of one run, written and read by all ranks together: every rank makes every call."""

    def __init__(self, run_dir: Path, state: State, ranks: Ranks, identity: Identity, config: CheckpointConfig,
                 lease: SharedLease = NO_LEASE, averaged: bool = False,
                 constant_until: int | None = None) -> None:  # fmt: skip
        """`averaged`: the state has an average of the weights, which is written and read as well; `constant_until`:
        see `retention.reasons`."""
        self.kinds = (WEIGHTS, OPTIMIZER, AVERAGED) if averaged else (WEIGHTS, OPTIMIZER)
        self.run_dir, self.state, self.ranks = run_dir, state, ranks
        self.identity, self.config = identity, config
        self._manifest: tuple[Path, dict[str, Any]] | None = None
        self._versions = versions() if ranks.first else {}  # asks git, which a save should not wait for
        self._saver = Saver(run_dir, state, ranks, config.background, partial(tidy, run_dir, config, constant_until),
                            lease, self.kinds)  # fmt: skip

    def start(self, position: Position, validation_loss: float | None = None, full: bool = True) -> Failed | None:
        """Begin the checkpoint of `position`, which `poll` or `finish` commits; None when it is under way.

        `validation_loss`: in nats, when the weights have just been evaluated; `full`: not of the weights alone.
        """
        self._manifest = None
        kinds = self.kinds if full else (WEIGHTS,)
        return self._saver.start(self.described(position, validation_loss), self.own(position), kinds)

    def described(self, position: Position, validation_loss: float | None = None) -> dict[str, Any]:
        """The manifest of what is saved at `position`, without its files."""
        return {
            "format": FORMAT,
            "step": position.step,
            "tokens": position.tokens,
            "validation_loss_nats": validation_loss,
            "data": position.data,
            "skipped": position.skipped,
            "updates": self.state.updates(),
            "recipe": self.identity.recipe,
            "settings": self.identity.settings,
            "groups": self.identity.groups,
            "layout": vars(self.identity.layout),
            "versions": self._versions,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }

    def own(self, position: Position) -> dict[str, Any]:
        """What this rank alone knows at `position`."""
        return {"rng": rng.capture(self.ranks.device), "carried": _on_host(position.carried)}

    @property
    def pending(self) -> int | None:
        """Step of the checkpoint that is being written; None when none is."""
        return self._saver.step

    def poll(self) -> Saved | Failed | None:
        """What became of the checkpoint under way, once all ranks are through with it; None until then."""
        return self._saver.poll()

    def finish(self) -> Saved | Failed | None:
        """What became of the checkpoint under way, waiting for it and for removals; None when there is none."""
        return self._saver.finish()

    def rehearse(self) -> None:
        """Before the first step: raise StorageError on all ranks unless each can write a checkpoint."""
        self._saver.rehearse()

    def newest(self, scheduled: bool = False) -> tuple[Path | None, list[str]]:
        """The newest checkpoint to continue from that is whole, and what is wrong with newer ones.

        `scheduled`: of those alone that are taken in every course of the run, however often it was stopped.

        The ranks share the reading, and a second rank confirms what is damaged. Damaged ones are renamed: their steps
        will be taken again, and no damaged one may count as one to keep. Raises StorageError on all ranks when one
        cannot read, or they see different files: nothing is renamed then.
        """
        self.finish()
        self._manifest = None
        damaged = []
        for checkpoint in agreed_committed(self.ranks, self.run_dir):
            if scheduled and not self.config.scheduled(step_of(checkpoint)):
                continue
            if found := judged(self.ranks, checkpoint):
                damaged.append(f"checkpoint {step_of(checkpoint)}: {found[0]}")
                if self.ranks.first:
                    set_aside(checkpoint)
            elif is_full(self._manifest_of(checkpoint)):
                return checkpoint, damaged
        return None, damaged

    def require_whole(self, checkpoint: Path) -> None:
        """Raise CheckpointError when a checkpoint, of whatever run, is damaged; it stays as it is."""
        if found := judged(self.ranks, checkpoint):
            raise CheckpointError(f"{checkpoint}: {found[0]}")

    def load(self, checkpoint: Path, of_trunk: bool = False) -> Position:
        """Put the engine and the generators where they were; raises CheckpointError for another run's checkpoint.

        Under another layout than it was written, generators start anew: what they draw could not be the same.
        `of_trunk`: the run branches off another, and that it may has been seen to.
        """
        manifest = self._manifest_of(checkpoint)
        if not of_trunk:
            self._require_same(checkpoint, manifest)
        self._fill(checkpoint, manifest)
        return self._resume(manifest, cache(partial(_own, checkpoint)))

    def load_local(self, copy: LocalCopy) -> Position:
        """The same from this rank's local copy, taken under the same layout."""
        self._require_same(copy.path, copy.manifest)
        averaged = AVERAGED in copy.manifest["kinds"]  # else the average begins with the weights, as in `_fill`
        self._fill_from(copy.path, lambda _: copy.shards(), lambda parameter, tensor: copied_name(
            parameter, WEIGHT if tensor == AVERAGE and not averaged else tensor))  # fmt: skip
        own = copy.own()
        return self._resume(copy.manifest, lambda _: own)

    def _resume(self, manifest: dict[str, Any], own: Callable[[int], dict[str, Any]]) -> Position:
        """Once the weights and moments are there: all else. `own`: what a rank alone knew."""
        self.state.filled(manifest["step"], manifest["updates"])
        saved, rank = Layout(**manifest["layout"]), self.ranks.rank
        if self._same_ranks(saved):
            rng.restore(own(rank)["rng"], self.ranks.device)
        else:
            rng.seed_all(self.identity.seed, rank, manifest["step"])
        carried = redistribute(self.identity.rows, saved, lambda other: own(other)["carried"])
        return Position(manifest["step"], manifest["tokens"], manifest["data"], carried, manifest["skipped"])

    def reached(self) -> tuple[int, int]:
        """How far the newest checkpoint to resume from is: data skipped and step, by its manifest alone; all ranks see
        the same checkpoints, or StorageError is raised on all. (0, 0) when there is none."""
        for checkpoint in agreed_committed(self.ranks, self.run_dir):
            try:
                manifest = manifest_of(self.ranks, checkpoint)
            except CheckpointError:
                continue  # `newest` says what is wrong with it, if it is ever wanted
            if is_full(manifest):
                return manifest["skipped"], manifest["step"]
        return 0, 0

    def change(self, checkpoint: Path) -> str | None:
        """How the layout differs from the one that the checkpoint was written under; None when it does not."""
        saved, own = Layout(**self._manifest_of(checkpoint)["layout"]), self.identity.layout
        if saved == own:
            return None
        return f"from {saved} to {own}" + ("" if self._same_ranks(saved) else ", new seeds for the random generators")

    def _manifest_of(self, checkpoint: Path) -> dict[str, Any]:
        """Read once for all ranks, and for all that is asked of a checkpoint until the next is looked for."""
        if self._manifest is None or self._manifest[0] != checkpoint:
            self._manifest = checkpoint, manifest_of(self.ranks, checkpoint)
        return self._manifest[1]

    def _same_ranks(self, saved: Layout) -> bool:
        own = self.identity.layout
        return (saved.ranks, saved.sp) == (own.ranks, own.sp)

    def _require_same(self, checkpoint: Path, manifest: dict[str, Any]) -> None:
        """Checkpoints from before settings were in the manifest are held to the recipe in their run's directory alone,
        as all are."""
        there, own = manifest.get("settings"), json.loads(json.dumps(self.identity.settings))
        for name in sorted({**(there or own), **own}):
            if there is not None and there.get(name) != own.get(name) and not self.identity.may_change(name):
                raise CheckpointError(
                    f"{checkpoint}: belongs to another run: {name} is {there.get(name, 'not set')!r}, here "
                    f"{own.get(name, 'not set')!r}"
                )

    def _fill(self, checkpoint: Path, manifest: dict[str, Any]) -> None:
        """Read what this rank holds from whichever ranks had written it: under the same layout from its own files
        alone, and in every other from those that have some of it."""
        own = self.ranks.rank if Layout(**manifest["layout"]) == self.identity.layout else None

        def opened(kind: str) -> Shards:
            # A run that has begun without an average starts one from the weights it has come to.
            there = kind if has(manifest, kind) or kind != AVERAGED else WEIGHTS
            return open_shards(checkpoint, there, own, manifest)

        self._fill_from(checkpoint, opened, stored_name)

    def _fill_from(self, checkpoint: Path, opened: Callable[[str], Shards], named: Callable[[str, str], str]) -> None:
        """`opened`: the shards of a kind; `named`: what a parameter's tensor is called there."""
        held = self.state.held()
        for kind in self.kinds:
            shards, wanted = opened(kind), []
            for tensor in TENSORS[kind]:
                for fragment in (one for one in held if tensor in one.values):
                    name = named(fragment.piece.name, tensor)
                    self._require_shape(checkpoint, name, fragment.piece.shape, shards.shape(name))
                    wanted.append((name, fragment.piece.begin, fragment.values[tensor]))
            shards.fill(wanted)
            shards.close()

    @staticmethod
    def _require_shape(checkpoint: Path, name: str, own: tuple[int, ...], saved: tuple[int, ...] | None) -> None:
        if own != saved:
            raise CheckpointError(f"{checkpoint}: belongs to another model: {name} has {saved} values, here {own}")


class Evaluated(Writer):
    """Remembers the last evaluation; only rank 0's receives any."""

    def __init__(self, on: str = "validation") -> None:
        """`on`: which one (checkpoint.keep_best_on)."""
        self.on = on
        self._last: EvalReport | None = None

    def write(self, report: Report) -> None:
        if isinstance(report, EvalReport) and report.kind != AVERAGED and report.split == self.on:
            self._last = report

    def loss(self, step: int) -> float | None:
        """Validation loss in nats of the weights after `step` steps, if they were evaluated."""
        return self._last.loss_nats if self._last and self._last.step == step else None


class Progress(Protocol):
    """How far the run is (`train.step.Trainer`)."""

    tokens: int
    """Valid tokens trained on so far, over all ranks."""
    carried: list[Any]
    """The past carried to the next step, one entry a micro-batch."""
    skipped: int
    """Steps' worth of data skipped by rollbacks."""


class Checkpoints(Callback):
    """Takes a checkpoint every so many steps, and after the last."""

    phase = "checkpoint"

    def __init__(self, config: CheckpointConfig, snapshots: Snapshots, trainer: Progress, evaluated: Evaluated,
                 data_state: Callable[[int], dict[str, Any]], say: Callable[[str], None]) -> None:  # fmt: skip
        """`evaluated`: what the weights are worth; `data_state`: the loader's state after a number of steps; `say`: how
        people are told."""
        self.config, self.snapshots, self.trainer, self.evaluated = config, snapshots, trainer, evaluated
        self.data_state, self.say = data_state, say
        self.failed = 0
        """Checkpoints in a row that could not be written."""
        self._step: int | None = None
        """The last that was taken; None: none was."""
        self._full: int | None = None
        """That of the last full checkpoint."""

    def after_step(self, report: StepReport, last: bool) -> None:
        """Commit what was under way, begin what is due; after the last step, wait for it.

        A checkpoint that cannot be written is told of and the run continues, with the one before it as it was; but not
        without the last one, nor after `checkpoint.failures` in a row: raises StorageError on all ranks.
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

    def ended(self) -> None:
        """Commit what was under way, and take the checkpoint of the last step unless it is there."""
        self._tell(self.snapshots.finish())
        if self._step is not None and self._full != self._step:
            loss = self.evaluated.loss(self._step)
            self._tell(self.snapshots.start(self.position(self._step), loss), last=True)
            self._tell(self.snapshots.finish(), last=True)

    def position(self, step: int) -> Position:
        """Where the run stands, now that `step` steps are done."""
        trainer = self.trainer
        return Position(step, trainer.tokens, self.data_state(step), trainer.carried, trainer.skipped)

    def _tell(self, outcome: Saved | Failed | None, last: bool = False) -> None:
        if isinstance(outcome, Failed):
            self.failed += 1
            message = f"no checkpoint of step {outcome.step}: {outcome.why}"
            if last:
                raise StorageError(message)
            if self.failed >= self.config.failures:
                raise StorageError(f"{message}\nthe run stops: {self.failed} in a row (checkpoint.failures)")
            self.say(f"{message}\n{'':>12} the run continues; earlier checkpoints are unchanged")
        elif outcome:
            self.failed = 0
            self._full = step_of(outcome.path) if outcome.full else self._full
            kind = "checkpoint" if outcome.full else "weights"
            self.say(f"{'':>12} {kind} {outcome.path}: {outcome.bytes / 1e6:,.1f} MB in {outcome.seconds:.1f} s")


def _on_host(carried: Carried) -> Carried:
    return [{**entry, "state": {name: tensor.cpu() for name, tensor in entry["state"].items()}} for entry in carried]


def _own(checkpoint: Path, rank: int) -> dict[str, Any]:
    """What a rank alone knew."""
    path = checkpoint / rank_file(rank)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StorageError.of(error, path) from None
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
