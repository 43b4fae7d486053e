"""Local copies: the newest states of a run in the memory of its nodes; each rank's copy is also on another node.

    /dev/shm/bst-demo-5f1c…/step-00000012.skipped-0.epoch-3/rank-00000

Every `checkpoint.local_every` steps, and with every checkpoint, training waits for a copy in host memory. A thread
writes it (`writing`, `file`) and sends it to another node (`exchange`). All ranks must finish this before the next step
is reported, so a killed run loses at most `local_every` of the steps that it has reported. Two copies are kept: the
older one is complete while the newer one is written. A third is kept while a checkpoint of its step is being written.

A start that can take no copies can still resume from those of an earlier one. It removes them when one of its
checkpoints is as new.

The directory's name contains a hash of a random token in the run directory and of the run directory's path. So a new
run never uses the copies of a removed run at the same path, and a copied run directory never uses those of the
original. Each copy's name contains its step and the start that took it, so copies of different starts are never mixed.
"""

from __future__ import annotations

import hashlib
import secrets
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from bst_base.errors import StorageError
from bst_base.files import atomic_file
from bst_dist.checkpoint.agreement import of_first
from bst_dist.checkpoint.attempt import attempt
from bst_dist.checkpoint.callbacks import Evaluated
from bst_dist.checkpoint.directory import committed, step_of
from bst_dist.checkpoint.local.exchange import Node
from bst_dist.checkpoint.local.file import Key, LocalCopy
from bst_dist.checkpoint.local.search import Found, fetch_copies, folders, list_copies
from bst_dist.checkpoint.local.writing import CopyWriter, NoNewCopiesError, message, open_writer
from bst_dist.checkpoint.saving import Failed, Saved
from bst_dist.checkpoint.snapshot import Position, Snapshots
from bst_dist.faults.lease import LEASE
from bst_dist.parallel.ranks import Ranks
from bst_dist.report.callback import Callback
from bst_dist.report.metrics import StepReport

TOKEN = "local-copies"
"""File in the lease directory with the random token of this run."""


def open_copies(run_dir: Path, snapshots: Snapshots, ranks: Ranks, epoch: int, resume: bool) -> LocalCopies | None:
    """Return a run's local copies; None when it takes none and can have none to resume from. All ranks call it.

    `epoch`: of this start's lease. `resume`: whether old copies may be used; else they are removed.
    """
    config = snapshots.config
    name, old = of_first(ranks, lambda: _names(run_dir, bool(config.local_every), resume))
    if old:
        shutil.rmtree(config.local_directory / old, ignore_errors=True)
    return LocalCopies(run_dir, snapshots, ranks, config.local_directory / name, epoch) if name else None


class LocalCopies:
    """Takes and loads the local copies of one run, on one rank; every rank makes every call."""

    def __init__(self, run_dir: Path, snapshots: Snapshots, ranks: Ranks, root: Path, epoch: int) -> None:
        """`root`: the directory of the copies, on each node. `epoch`: of this start's lease."""
        self.run_dir, self.snapshots, self.ranks, self.config = run_dir, snapshots, ranks, snapshots.config
        self.root, self.epoch = root, epoch
        self._held: list[Key] = []
        """Copies that are complete on all ranks, oldest first."""
        self._owed: list[Key] = []
        """Copies whose step has a checkpoint due that was not committed before the run was killed."""
        node, error = attempt(lambda: Node.here(root))
        nodes, whys = zip(*ranks.all_gather_object((node, message(error))), strict=True)
        self._hosts = [node.host if node else None for node in nodes]
        places = [node.directory if node else f"none of rank {rank}" for rank, node in enumerate(nodes)]
        self._heads = [places.index(place) for place in places]
        """For each rank the first rank of its node, which lists and removes copies for the others."""
        self._writer: CopyWriter | None = None
        """Takes new copies; None when this start takes none, but can resume from old ones."""
        if self.config.local_every:
            try:
                if why := next(filter(None, whys), None):
                    raise NoNewCopiesError(why)
                self._writer = open_writer(run_dir, snapshots, ranks, root, nodes)
            except NoNewCopiesError as error:
                self._say_no_new(error)

    def describe(self) -> str:
        """Return the text about new local copies for the header of a start; empty when it takes none."""
        return self._writer.describe() if self._writer else ""

    # Resuming

    def find(self, shown: Callable[[int], bool], refusal: str | None = None) -> tuple[Position, str] | None:
        """Load the newest complete copies that are not older than the newest checkpoint.

        Returns the position and a description of the copies; None when there are no such copies. `shown`: whether the
        run's metrics contain a step, since they may have lost the last ones; called on rank 0. `refusal`: the reason
        why no copies may be used, if any.
        """
        reached = self.snapshots.reached()
        found = list_copies(self.ranks, self.root, self._heads)
        newer = [key for key in sorted(found, reverse=True) if (key.skipped, key.step) >= reached]
        newer, saved = of_first(
            self.ranks,
            lambda: ([key for key in newer if shown(key.step)], {step_of(path) for path in committed(self.run_dir)}),
        )
        for place, key in enumerate(newer):
            why = refusal or found[key].missing(self.snapshots.identity.layout)
            taken, why = ([], why) if why else fetch_copies(self.ranks, self.root, self._heads, found[key])
            if why:
                self.ranks.print_first(f"local copies of step {key.step} are not used: {why}")
                continue
            self._held = [key]
            for one in newer[place:]:
                if one.step not in saved and self.config.wanted(one.step) and self._whole(found[one]):
                    self._owed.insert(0, one)
            given = ", ".join(f"rank {rank}'s from {self._hosts[found[key].holders[rank][0]]}" for rank in taken[:4])
            source = f"the local copies in {self.root}" + (f" ({given})" if given else "")
            return self._load(key), source
        return None

    def _whole(self, found: Found) -> bool:
        """Bring each rank's copy to its own node; return whether all are there, undamaged and of this layout."""
        if found.missing(self.snapshots.identity.layout):
            return False
        return fetch_copies(self.ranks, self.root, self._heads, found)[1] is None

    def _load(self, key: Key) -> Position:
        return self.snapshots.load_local(LocalCopy(key.path(self.root, self.ranks.rank)))

    def begin(self, position: Position, until: int) -> Position:
        """Write the checkpoints that are still owed, and remove copies that are no longer needed.

        Called before the first step. Other copies are loaded to write their checkpoints; then the newest is loaded
        again. Returns its position, else `position`. Raises StorageError when the last step's checkpoint fails.
        """
        if self._held and position.step >= until and self._owed[-1:] != self._held:
            self._owed += self._held
        for key in self._owed:
            self._tell(self.snapshots.finish())
            position = self._load(key)
            loss = LocalCopy(key.path(self.root, self.ranks.rank)).manifest["validation_loss_nats"]
            full = self.config.scheduled(key.step) or key.step >= until
            self._tell(self.snapshots.start(position, loss, full), last=key.step >= until)
        if self._held and position.step >= until:
            self._tell(self.snapshots.finish(), last=True)
        if self._owed and self._owed[-1:] != self._held:
            position = self._load(self._held[0])
        self._prune([*self._owed, *self._held])
        self._held = [*(key for key in self._owed if key not in self._held), *self._held]
        if not (self._writer or self._held):
            self._remove_all()
        return position

    def _tell(self, outcome: Saved | Failed | None, last: bool = False) -> None:
        if isinstance(outcome, Failed):
            if last:
                raise StorageError(str(outcome))
            self.ranks.print_first(str(outcome))

    # Training

    def callbacks(self, position: Callable[[int], Position], evaluated: Evaluated) -> tuple[list[Callback], ...]:
        """Return the callbacks to run before a step is reported, and those to run after its evaluation.

        `position`: returns the run's position after a step.
        """
        return [_Settle(self)], [_Take(self, position, evaluated)]

    def due(self, step: int) -> bool:
        """Whether a copy is taken after `step` steps."""
        return self._writer is not None and (step % self.config.local_every == 0 or self.config.wanted(step))

    def take(self, position: Position, validation_loss: float | None) -> None:
        """Begin a copy of the state, which `settle` waits for; only call it when one is `due`."""
        self._held = self._needed()
        key = Key(position.skipped, position.step, self.epoch)
        self._writer.take(key, position, validation_loss, partial(self._prune, [*self._held, key]))

    def _needed(self) -> list[Key]:
        """Return the newest complete copies, and those of a checkpoint that is being written."""
        return [one for one in self._held[:-1] if one.step == self.snapshots.pending] + self._held[-1:]

    def settle(self) -> None:
        """Wait until all ranks have written and sent the last copy. When one failed, take no more in this start.

        The last complete copies then stay until a checkpoint is as new.
        """
        try:
            if self._writer and (key := self._writer.settle()):
                self._held.append(key)
        except NoNewCopiesError as error:
            self._say_no_new(error)
            self._writer, self._held = None, self._needed()
            self._prune(self._held)
        if self._writer is None and all(self.snapshots.saved >= (key.skipped, key.step) for key in self._held):
            self._held.clear()
            self._remove_all()

    def _say_no_new(self, why: NoNewCopiesError) -> None:
        self.ranks.print_first(f"no new local copies (checkpoint.local_every) in the rest of this start: {why}")

    def _prune(self, kept: Sequence[Key]) -> None:
        """Remove all copies on this node except `kept` and those of later starts.

        A later start exists when this one lost its lease and has not noticed it yet.
        """
        for folder in folders(self.root) if self.ranks.rank == self._heads[self.ranks.rank] else ():
            key = Key.of(folder.name)
            if key and key.epoch <= self.epoch and key not in kept:
                shutil.rmtree(folder, ignore_errors=True)

    def drop(self) -> None:
        """Remove all copies, because the run rolls back to an earlier checkpoint."""
        self.settle()
        self._held.clear()
        self._prune(())

    def remove(self) -> None:
        """Remove the directory at the end of a start, unless the newest copy is newer than the newest checkpoint."""
        self.settle()
        if not self.ahead(ending=True):
            self._remove_all()

    def _remove_all(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)

    def ahead(self, ending: bool = False) -> bool:
        """Whether the newest copies are newer than the newest checkpoint. `ending`: see `Snapshots.reached`."""
        newest = self._held[-1:]
        return bool(newest) and self.snapshots.reached(ending) < (newest[0].skipped, newest[0].step)


class _Settle(Callback):
    phase = "checkpoint"

    def __init__(self, copies: LocalCopies) -> None:
        self.copies = copies

    def after_step(self, report: StepReport, last: bool) -> None:
        self.copies.settle()

    def after_interruption(self) -> None:
        self.copies.settle()


class _Take(Callback):
    """Takes the copies that are due, except after the last step of a start, which has a checkpoint."""

    phase = "checkpoint"

    def __init__(self, copies: LocalCopies, position: Callable[[int], Position], evaluated: Evaluated) -> None:
        self.copies, self.position, self.evaluated = copies, position, evaluated

    def after_step(self, report: StepReport, last: bool) -> None:
        if not last and self.copies.due(report.step):
            self.copies.take(self.position(report.step), self.evaluated.loss(report.step))


def _names(run_dir: Path, wanted: bool, resume: bool) -> tuple[str | None, str | None]:
    """Return the name of this start's directory of copies, and the name of one to remove; None where there is none.

    `wanted`: whether this start takes copies. Old ones are for a start that resumes, even if it takes no new ones.
    """
    path, place = run_dir / LEASE / TOKEN, run_dir.resolve()

    def name(token: str) -> str:
        return f"bst-{place.name}-{hashlib.sha256(f'{token} {place}'.encode()).hexdigest()[:16]}"

    before = path.read_text() if path.exists() else None
    if resume and before:
        return name(before), None
    old = before and name(before)
    if not wanted:
        path.unlink(missing_ok=True)
        return None, old
    token = secrets.token_hex(8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.write(token.encode())
    return name(token), old
