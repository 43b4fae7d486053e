"""Local copies: the newest states of a run in the memory of its nodes; each rank's copy is also on another node.

    /dev/shm/bst-demo-5f1c…/step-00000012.skipped-0.epoch-3/rank-00000

Every `checkpoint.local_every` steps, and with every checkpoint, training waits for a copy in host memory. A thread
writes it (`file`) and sends it to another node (`exchange`). All ranks must finish this before the next step is
reported, so a killed run loses at most `local_every` of the steps that it has reported. Two copies are kept: the older
one is complete while the newer one is written. A third is kept while a checkpoint of its step is being written.

The directory's name contains a hash of a random token in the run directory and of the run directory's path. So a new
run never uses the copies of a removed run at the same path, and a copied run directory never uses those of the
original. Each copy's name contains its step and the start that took it, so copies of different starts are never mixed.
"""

from __future__ import annotations

import hashlib
import secrets
import shutil
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from bst_base.errors import StorageError
from bst_base.files import atomic_file
from bst_dist.checkpoint.agreement import of_first
from bst_dist.checkpoint.attempt import attempt
from bst_dist.checkpoint.callbacks import Evaluated
from bst_dist.checkpoint.config import LOCAL_COPIES_KEPT
from bst_dist.checkpoint.directory import committed, step_of
from bst_dist.checkpoint.host_copy import Copied, HostCopy
from bst_dist.checkpoint.local.exchange import Exchange, Node, keepers
from bst_dist.checkpoint.local.file import Key, LocalCopy, write_copy
from bst_dist.checkpoint.local.search import Found, fetch_copies, list_copies
from bst_dist.checkpoint.saving import Failed, Saved
from bst_dist.checkpoint.snapshot import Position, Snapshots
from bst_dist.faults import ledger
from bst_dist.faults.lease import LEASE
from bst_dist.parallel.ranks import Ranks
from bst_dist.report.callback import Callback
from bst_dist.report.metrics import StepReport

TOKEN = "local-copies"
"""File in the lease directory with the random token of this run."""


class LocalCopies:
    """Takes and loads the local copies of one run, on one rank; every rank makes every call."""

    def __init__(self, run_dir: Path, snapshots: Snapshots, ranks: Ranks, epoch: int, resume: bool) -> None:
        """`epoch`: of this start's lease. Removes old copies when the run is not resumed or `local_every` is 0."""
        self.run_dir, self.snapshots, self.ranks, self.config = run_dir, snapshots, ranks, snapshots.config
        self.epoch, self.on = epoch, bool(self.config.local_every)
        name, old = of_first(ranks, lambda: _names(run_dir, self.on, resume))
        if old:
            shutil.rmtree(self.config.local_directory / old, ignore_errors=True)
        self.root = self.config.local_directory / name
        self._held: list[Key] = []
        """Copies that are complete on all ranks, oldest first."""
        self._owed: list[Key] = []
        """Copies whose step has a checkpoint due that was not committed before the run was killed."""
        self._writing: tuple[Key, Future[str | None]] | None = None
        if self.on:
            self._open()

    def _open(self) -> None:
        """Exchange which node each rank is on, and create the group of ranks that send copies to each other.

        Turns the copies off if a rank cannot connect to the others, or if one node has not enough space for them: a
        full /dev/shm would also break other programs and NCCL.
        """
        held = self.snapshots.state.held()
        own = LOCAL_COPIES_KEPT * 4 * sum(fragment.elements(self.snapshots.kinds) for fragment in held)
        node, error = attempt(lambda: Node.here(self.root))
        seen = self.ranks.all_gather_object((node, _message(error), own))
        self._turn_off([why for _, why, _ in seen if why])
        if not self.on:
            return
        self._hosts, places = [node.host for node, *_ in seen], [node.directory for node, *_ in seen]
        self._heads = [places.index(place) for place in places]
        """For each rank the first rank of its node, which lists and removes copies for the others."""
        kept_by, needed = keepers(places), dict.fromkeys(places, 0)
        for rank, (*_, size) in enumerate(seen):
            for holder in {rank, kept_by[rank]} - {None}:
                needed[places[holder]] += size
        self._turn_off(
            [
                f"{node.host} has {node.free / 1e6:,.1f} MB free in {self.config.local_directory}, local copies may "
                f"take {needed[node.directory] / 1e6:,.1f} MB: make room, or set checkpoint.local_directory or "
                "checkpoint.local_every"
                for node, *_ in seen
                if node.free < needed[node.directory]
            ]
        )
        if not self.on:
            return
        exchange, error = attempt(lambda: Exchange(self.ranks.rank, places))
        self._turn_off([why for why in self.ranks.all_gather_object(_message(error)) if why])
        if self.on:
            self._needed, self._kept_by, self._exchange = max(needed.values()), kept_by, exchange
            self._copy, self._thread = HostCopy(self.ranks.device), ThreadPoolExecutor(1, "local-copy")

    def describe(self) -> str:
        """Return the text about local copies for the header of a start."""
        elsewhere = sum(keeper is not None for keeper in self._kept_by)
        where = f"those of {elsewhere} of {self.ranks.world} ranks also on another node" if elsewhere else "one node"
        every = self.config.local_every
        often = "every step" if every == 1 else f"every {every} steps"
        room = f"up to {self._needed / 1e6:,.1f} MB of a node's memory"
        return f"{often} in {self.config.local_directory}, {where}; {room}"

    # Resuming

    def find(self, shown: Callable[[int], bool], refusal: str | None = None) -> tuple[Position, str] | None:
        """Load the newest complete copies that are not older than the newest checkpoint.

        Returns the position and a description of the copies; None when there are no such copies. `shown`: whether the
        run's metrics contain a step, since they may have lost the last ones; called on rank 0. `refusal`: the reason
        why no copies may be used, if any.
        """
        if not self.on:
            return None
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
        if not self.on:
            return position
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
        return position

    def _tell(self, outcome: Saved | Failed | None, last: bool = False) -> None:
        if isinstance(outcome, Failed):
            message = f"no checkpoint of step {outcome.step}: {outcome.why}"
            if last:
                raise StorageError(message)
            self.ranks.print_first(message)

    # Training

    def callbacks(self, position: Callable[[int], Position], evaluated: Evaluated) -> tuple[list[Callback], ...]:
        """Return the callbacks to run before a step is reported, and those to run after its evaluation.

        `position`: returns the run's position after a step.
        """
        return ([_Settle(self)], [_Take(self, position, evaluated)]) if self.on else ([], [])

    def due(self, step: int) -> bool:
        """Whether a copy is taken after `step` steps."""
        return self.on and (step % self.config.local_every == 0 or self.config.wanted(step))

    def take(self, position: Position, validation_loss: float | None) -> None:
        """Copy the state to host memory, and let the thread write and send it."""
        self._held = [one for one in self._held[:-1] if one.step == self.snapshots.pending] + self._held[-1:]
        key = Key(position.skipped, position.step, self.epoch)
        copied = self._copy.of(self.snapshots.state.held(), self.snapshots.kinds)
        own = self.snapshots.own(position)
        manifest = {**self.snapshots.described(position, validation_loss), "kinds": self.snapshots.kinds}
        work = self._thread.submit(self._write, key, [*self._held, key], copied, own, manifest)
        self._writing = key, work

    def _write(
        self, key: Key, kept: Sequence[Key], copied: Sequence[Copied], own: dict[str, Any], manifest: dict[str, Any]
    ) -> str | None:
        """Write and send this rank's copy and receive the one it keeps; return None or an error message.

        Runs in the thread.
        """
        with suppress(OSError):
            self._prune(kept)
        if self.ranks.first:  # the metrics and the ledger must survive this host's failure as the copies do
            with suppress(OSError):  # the writers of these files report such errors
                ledger.sync(self.run_dir)
        path, kept_for = key.path(self.root, self.ranks.rank), self._exchange.kept
        unwritten = attempt(lambda: write_copy(path, copied, own, manifest)).error
        unsent = attempt(lambda: self._exchange.swap(path, key.path(self.root, kept_for or 0))).error
        return _message(unwritten or unsent)

    def settle(self) -> None:
        """Wait until all ranks have written and sent the last copy; when one failed, turn the copies off."""
        if self._writing is None:
            return
        (key, work), self._writing = self._writing, None
        why = work.result()
        (failed,) = self.ranks.all_reduce_numbers([why is not None])
        if failed:
            self._turn_off([said for said in self.ranks.all_gather_object(why) if said])
        else:
            self._held.append(key)

    def _turn_off(self, reasons: Sequence[str]) -> None:
        if reasons:
            self.ranks.print_first(f"no local copies (checkpoint.local_every) in the rest of this start: {reasons[0]}")
            shutil.rmtree(self.root, ignore_errors=True)
            self.on = False

    def _prune(self, kept: Sequence[Key]) -> None:
        """Remove all copies on this node except `kept` and those of later starts.

        A later start exists when this one lost its lease and has not noticed it yet.
        """
        for folder in self.root.iterdir() if self.ranks.rank == self._heads[self.ranks.rank] else ():
            key = Key.of(folder.name)
            if key and key.epoch <= self.epoch and key not in kept:
                shutil.rmtree(folder, ignore_errors=True)

    def drop(self) -> None:
        """Remove all copies, because the run rolls back to an earlier checkpoint."""
        self.settle()
        self._held.clear()
        if self.on:
            self._prune(())

    def remove(self) -> None:
        """Remove the directory at the end of a start, unless the newest copy is newer than the newest checkpoint."""
        self.settle()
        if not self.ahead():
            shutil.rmtree(self.root, ignore_errors=True)

    def ahead(self) -> bool:
        """Whether the newest copies are newer than the newest checkpoint."""
        newest = self._held[-1:]
        return bool(newest) and self.snapshots.reached() < (newest[0].skipped, newest[0].step)


class _Settle(Callback):
    phase = "checkpoint"

    def __init__(self, copies: LocalCopies) -> None:
        self.copies = copies

    def after_step(self, report: StepReport, last: bool) -> None:
        self.copies.settle()

    def ended(self) -> None:
        self.copies.settle()


class _Take(Callback):
    """Takes the copies that are due, except after the last step of a start, which has a checkpoint."""

    phase = "checkpoint"

    def __init__(self, copies: LocalCopies, position: Callable[[int], Position], evaluated: Evaluated) -> None:
        self.copies, self.position, self.evaluated = copies, position, evaluated

    def after_step(self, report: StepReport, last: bool) -> None:
        if not last and self.copies.due(report.step):
            self.copies.take(self.position(report.step), self.evaluated.loss(report.step))


def _names(run_dir: Path, wanted: bool, resume: bool) -> tuple[str, str | None]:
    """Return the name of this start's directory of copies, and the name of one to remove, or None."""
    path, place = run_dir / LEASE / TOKEN, run_dir.resolve()

    def name(token: str) -> str:
        return f"bst-{place.name}-{hashlib.sha256(f'{token} {place}'.encode()).hexdigest()[:16]}"

    before = path.read_text() if path.exists() else None
    if wanted and resume and before:
        return name(before), None
    token = secrets.token_hex(8)
    if wanted:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            file.write(token.encode())
    elif before:
        path.unlink()
    return name(token), before and name(before)


def _message(error: Exception | None) -> str | None:
    """Return the message of an error, of any kind: the run can continue without copies. None when there is none."""
    if isinstance(error, OSError):
        return str(StorageError.of(error, doing="write"))
    return error and f"{socket.gethostname()}: {error!r}"  # for example torch's errors in an exchange
