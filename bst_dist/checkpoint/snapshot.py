"""Takes checkpoints of a run, and resumes from them: exactly under the same layout, up to rounding under another."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from bst_base.clock import utc_now
from bst_base.errors import StorageError
from bst_dist.checkpoint import rng, saving
from bst_dist.checkpoint.agreement import (
    common_checkpoints,
    confirmed_damage,
    manifest_of,
    of_first,
    read_together,
)
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
    committed,
    has,
    is_full,
    open_shards,
    rank_file,
    require_intact,
    step_of,
    stored_name,
)
from bst_dist.checkpoint.fragments import Fragment
from bst_dist.checkpoint.layout import Carried, Layout, Rows, redistribute
from bst_dist.checkpoint.local.file import LocalCopy, copied_name
from bst_dist.checkpoint.retention import set_aside, tidy
from bst_dist.checkpoint.saving import Failed, Saved, Saver
from bst_dist.checkpoint.shards import Shards
from bst_dist.faults.lease import NO_LEASE, SharedLease
from bst_dist.parallel.ranks import Ranks
from bst_dist.version import versions

Ended = TypeVar("Ended", bound=Saved | Failed | None)


@dataclass(frozen=True)
class Position:
    """Where a run stands after a number of steps, on one rank."""

    step: int
    tokens: int
    """Valid tokens trained on so far, over all ranks."""
    data: dict[str, Any]
    """The loader's state. On resume it is compared, so that the run reads the same data in the same order."""
    carried: list[Any]
    """The past carried to the next step, one entry per micro-batch; empty when nothing is carried."""
    skipped: int = 0
    """Number of steps whose data was skipped by roll-backs: step s trains on the data of step s + skipped."""


@dataclass(frozen=True)
class Identity:
    """The settings that identify a run, and its current layout over ranks."""

    recipe: str
    """Digest of the recipe's settings that affect the numbers; only shown, not compared."""
    groups: dict[str, Any]
    """Hyperparameters of the parameter groups, by name."""
    seed: int
    layout: Layout
    rows: Rows
    settings: dict[str, Any] = field(default_factory=dict)
    """The recipe's settings that are the same in every checkpoint of the run, by dotted name."""
    may_change: Callable[[str], bool] = lambda _: False
    """Whether a setting, given by name, may differ between checkpoints; older checkpoints list such settings too."""


class State(saving.State, Protocol):
    """The weights and optimizer states in the engine's memory (`fragments.EngineState`)."""

    def held(self) -> list[Fragment]:
        """Return all fragments on this rank, as views that can be written to."""

    def updates(self) -> int:
        """Return the number of updates that the optimizer has made."""

    def filled(self, step: int, updates: int) -> None:
        """Let the engine continue from the values written to the fragments."""


class Snapshots:
    """Writes and reads the checkpoints of one run with all ranks together: every rank makes every call."""

    def __init__(
        self,
        run_dir: Path,
        state: State,
        ranks: Ranks,
        identity: Identity,
        config: CheckpointConfig,
        lease: SharedLease = NO_LEASE,
        averaged: bool = False,
        constant_until: int | None = None,
    ) -> None:
        """`averaged`: the state has an average of the weights, which is written and read too. `constant_until`: see
        `retention.reasons`."""
        self.kinds = (WEIGHTS, OPTIMIZER, AVERAGED) if averaged else (WEIGHTS, OPTIMIZER)
        self.run_dir, self.state, self.ranks = run_dir, state, ranks
        self.identity, self.config = identity, config
        self.saved = (0, 0)
        """(skipped, step) of the last full checkpoint that this start has committed; (0, 0) before the first."""
        self.failed = 0
        """Number of consecutive checkpoints that could not be written."""
        self._begun = (0, 0)
        """(skipped, step) of the last checkpoint that was begun."""
        self._manifest: tuple[Path, dict[str, Any]] | None = None
        self._versions = versions() if ranks.first else {}  # runs git, so it is done before training
        self._saver = Saver(
            run_dir, state, ranks, config.background, partial(tidy, run_dir, config, constant_until), lease, self.kinds
        )

    def start(self, position: Position, validation_loss: float | None = None, full: bool = True) -> Failed | None:
        """Begin the checkpoint of `position`, which `poll` or `finish` commits; return Failed if it cannot be begun.

        `validation_loss`: in nats, if these weights were evaluated. `full`: write optimizer states and average too,
        not only the weights.
        """
        self._manifest, self._begun = None, (position.skipped, position.step)
        kinds = self.kinds if full else (WEIGHTS,)
        manifest = self.described(position, validation_loss)
        return self._noted(self._saver.start(manifest, self.rank_state(position), kinds))

    def described(self, position: Position, validation_loss: float | None = None) -> dict[str, Any]:
        """Return the manifest of a checkpoint at `position`, without its files."""
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
            "time": utc_now(),
        }

    def rank_state(self, position: Position) -> dict[str, Any]:
        """Return the state that only this rank has: its random generators and the carried past."""
        return {"rng": rng.capture(self.ranks.device), "carried": _on_host(position.carried)}

    @property
    def pending(self) -> int | None:
        """Step of the checkpoint that is being written; None when none is being written."""
        return self._saver.step

    def poll(self) -> Saved | Failed | None:
        """Return the outcome of the pending checkpoint once all ranks are done with it; None until then."""
        return self._noted(self._saver.poll())

    def finish(self) -> Saved | Failed | None:
        """Wait for the pending checkpoint and for removals; return its outcome, None when none was pending."""
        return self._noted(self._saver.finish())

    def finish_and_tell(self) -> None:
        """Do the same as `finish`, and print a failure; for a pending checkpoint that the run does not depend on."""
        if isinstance(outcome := self.finish(), Failed):
            self.ranks.print_first(str(outcome))

    def _noted(self, outcome: Ended) -> Ended:
        if isinstance(outcome, Failed):
            self.failed += 1
        elif isinstance(outcome, Saved):
            self.failed = 0
            if outcome.full:
                self.saved = self._begun
        return outcome

    def rehearse(self) -> None:
        """Test before the first step that every rank can write a checkpoint; else raise StorageError on all ranks."""
        self._saver.rehearse()

    def newest(self, scheduled: bool = False) -> tuple[Path | None, list[str]]:
        """Return the newest valid full checkpoint (None if there is none), and one message per newer damaged one.

        `scheduled`: consider only checkpoints at scheduled steps, which exist however often the run was stopped.

        The ranks share the reading, and a second rank confirms all damage. Damaged checkpoints are renamed: their steps
        will be taken again, and retention must not count them as kept. Raises StorageError on all ranks when a rank
        cannot read, or when ranks see different files. Then nothing is renamed.
        """
        self.finish_and_tell()
        self._manifest = None
        damaged = []
        # A roll-back: this start may have committed a checkpoint just now (`_just_committed`).
        for checkpoint in self._just_committed() if scheduled else common_checkpoints(self.ranks, self.run_dir):
            if scheduled and not self.config.scheduled(step_of(checkpoint)):
                continue
            if found := confirmed_damage(self.ranks, checkpoint):
                damaged.append(f"checkpoint {step_of(checkpoint)}: {found[0]}")
                if self.ranks.first:
                    set_aside(checkpoint)
            elif is_full(self._manifest_of(checkpoint)):
                return checkpoint, damaged
        return None, damaged

    def require_whole(self, checkpoint: Path) -> None:
        """Raise CheckpointError when a checkpoint (of any run) is damaged; it is not renamed."""
        require_intact(checkpoint, found=confirmed_damage(self.ranks, checkpoint))

    def load(self, checkpoint: Path, of_trunk: bool = False) -> Position:
        """Load a checkpoint into the engine and the random generators, and return its position.

        Raises CheckpointError for another run's checkpoint. With another number of ranks or another sp, the generators
        get new seeds: they could not draw the same numbers. `of_trunk`: the checkpoint is the trunk's, and
        `branch.origin` has already checked that it fits.
        """
        manifest = self._manifest_of(checkpoint)
        if not of_trunk:
            self._require_same(checkpoint, manifest)
        read_together(self.ranks, lambda arrived: self.fill(checkpoint, manifest, arrived))
        return self._resume(manifest, cache(partial(_read_rank_state, checkpoint)))

    def load_local(self, copy: LocalCopy) -> Position:
        """Load this rank's local copy, taken under the same layout, and return its position."""
        self._require_same(copy.path, copy.manifest)
        averaged = AVERAGED in copy.manifest["kinds"]  # else the average starts as the weights, as in `fill`

        def named(parameter: str, tensor: str) -> str:
            return copied_name(parameter, WEIGHT if tensor == AVERAGE and not averaged else tensor)

        read_together(self.ranks, partial(self._fill_from, copy.path, lambda _: copy.shards(), named))
        own = copy.rank_state()
        return self._resume(copy.manifest, lambda _: own)

    def _resume(self, manifest: dict[str, Any], own: Callable[[int], dict[str, Any]]) -> Position:
        """Restore everything but tensors: counters, generators, carried past. `own`: loads the state of one rank."""
        self.state.filled(manifest["step"], manifest["updates"])
        saved, rank = Layout(**manifest["layout"]), self.ranks.rank
        if self._same_ranks(saved):
            rng.restore(own(rank)["rng"], self.ranks.device)
        else:
            rng.seed_all(self.identity.seed, rank, manifest["step"])
        carried = redistribute(self.identity.rows, saved, lambda other: own(other)["carried"])
        return Position(manifest["step"], manifest["tokens"], manifest["data"], carried, manifest["skipped"])

    def reached(self, ending: bool = False) -> tuple[int, int]:
        """Return (skipped, step) of the newest full checkpoint, from its manifest only; (0, 0) when there is none.

        `ending`: at the end of a start, when rank 0 has just committed a checkpoint. Raises StorageError on all ranks
        when they see different checkpoints; not with `ending`.
        """
        for checkpoint in self._just_committed() if ending else common_checkpoints(self.ranks, self.run_dir):
            try:
                manifest = manifest_of(self.ranks, checkpoint)
            except CheckpointError:
                continue  # `newest` reports the damage if the checkpoint is needed
            if is_full(manifest):
                return manifest["skipped"], manifest["step"]
        return 0, 0

    def _just_committed(self) -> list[Path]:
        """Return the checkpoints that rank 0 sees, newest first.

        Rank 0 renames a checkpoint, and other hosts of a network file system may still list the directory as it was.
        """
        return of_first(self.ranks, lambda: committed(self.run_dir))

    def change(self, checkpoint: Path) -> str | None:
        """Return as text how the layout differs from that of the checkpoint; None when they are equal."""
        saved, own = Layout(**self._manifest_of(checkpoint)["layout"]), self.identity.layout
        if saved == own:
            return None
        return f"from {saved} to {own}" + ("" if self._same_ranks(saved) else ", new seeds for the random generators")

    def _manifest_of(self, checkpoint: Path) -> dict[str, Any]:
        """Return the manifest, read by one rank for all, and cached until `newest` or `start` is called."""
        if self._manifest is None or self._manifest[0] != checkpoint:
            self._manifest = checkpoint, manifest_of(self.ranks, checkpoint)
        return self._manifest[1]

    def _same_ranks(self, saved: Layout) -> bool:
        own = self.identity.layout
        return (saved.ranks, saved.sp) == (own.ranks, own.sp)

    def _require_same(self, checkpoint: Path, manifest: dict[str, Any]) -> None:
        """Raise CheckpointError when the checkpoint's settings are not those of this run.

        Old manifests have no settings. Their run is only checked by the recipe in the run directory, as every run is.
        """
        there, own = manifest.get("settings"), json.loads(json.dumps(self.identity.settings))
        for name in sorted({**(there or own), **own}):
            if there is not None and there.get(name) != own.get(name) and not self.identity.may_change(name):
                raise CheckpointError(
                    f"{checkpoint}: belongs to another run: {name} is {there.get(name, 'not set')!r}, here "
                    f"{own.get(name, 'not set')!r}"
                )

    def fill(self, checkpoint: Path, manifest: dict[str, Any], arrived: Callable[[], None] = lambda: None) -> None:
        """Fill this rank's tensors: from its own files under the same layout, else from all files that have parts."""
        own = self.ranks.rank if Layout(**manifest["layout"]) == self.identity.layout else None

        def opened(kind: str) -> Shards:
            # When train.average was added on resume, the average starts as the checkpoint's weights.
            there = kind if has(manifest, kind) or kind != AVERAGED else WEIGHTS
            return open_shards(checkpoint, there, own, manifest)

        self._fill_from(checkpoint, opened, stored_name, arrived)

    def _fill_from(
        self,
        checkpoint: Path,
        opened: Callable[[str], Shards],
        named: Callable[[str, str], str],
        arrived: Callable[[], None],
    ) -> None:
        """`opened`: opens the shards of a kind. `named`: returns a tensor's name there, from parameter and tensor."""
        held = self.state.held()
        for kind in self.kinds:
            shards, wanted = opened(kind), []
            for tensor in TENSORS[kind]:
                for fragment in (one for one in held if tensor in one.values):
                    name = named(fragment.piece.name, tensor)
                    self._require_shape(checkpoint, name, fragment.piece.shape, shards.shape(name))
                    wanted.append((name, fragment.piece.begin, fragment.values[tensor]))
            shards.fill(wanted, arrived)
            shards.close()

    @staticmethod
    def _require_shape(checkpoint: Path, name: str, own: tuple[int, ...], saved: tuple[int, ...] | None) -> None:
        if own != saved:
            raise CheckpointError(f"{checkpoint}: belongs to another model: {name} has {saved} values, here {own}")


def _on_host(carried: Carried) -> Carried:
    return [{**entry, "state": {name: tensor.cpu() for name, tensor in entry["state"].items()}} for entry in carried]


def _read_rank_state(checkpoint: Path, rank: int) -> dict[str, Any]:
    """Read the state that only `rank` had."""
    path = checkpoint / rank_file(rank)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StorageError.of(error, path) from None
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
