"""Writing a checkpoint from all ranks, and going on from one.

Two phases: every rank writes, syncs and digests its own files in a directory whose name says it is not done; when all
have, rank 0 writes the manifest and renames the directory. A process killed at any moment leaves the previous
checkpoint as it was. DeepSpeed's own ``latest`` file is not used: it appears before the other ranks' shards do.

Loading DeepSpeed's files runs what is pickled in them: go on only from checkpoints you trust.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from bst_dist.train import rng, weights
from bst_dist.train.checkpoint import (
    ENGINE,
    FORMAT,
    MANIFEST,
    PARTIAL,
    WEIGHTS,
    CheckpointConfig,
    CheckpointError,
    committed,
    damage,
    directory,
    rank_file,
    read_manifest,
    retain,
    set_aside,
)
from bst_dist.train.durable import DurableCheckpointEngine, FileRecord, Files
from bst_dist.train.loop import Trainer
from bst_dist.train.metrics import Callback, StepReport
from bst_dist.train.ranks import Ranks
from bst_dist.version import versions
from data_pipeline.atomic import sync_directory


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
    """Steps' worth of data passed over after roll-backs: step s trains on the data of step s + skipped."""


class Snapshots:
    """Checkpoints of one run, written and read by all ranks together."""

    def __init__(self, run_dir: Path, engine: Any, ranks: Ranks, identity: dict[str, Any]) -> None:
        """`identity` goes into every manifest: the recipe's digest, the mesh, the groups' hyperparameters."""
        self.run_dir, self.engine, self.ranks, self.identity = run_dir, engine, ranks, identity
        self._durable = engine.checkpoint_engine = DurableCheckpointEngine()

    def save(self, position: Position, config: CheckpointConfig) -> Path:
        """Write the checkpoint of `position`; it exists for good, or not at all, when this returns."""
        final = directory(self.run_dir, position.step)
        partial = final.with_name(final.name + PARTIAL)
        if self.ranks.first:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        self.ranks.barrier()
        files = Files(partial)
        self._write_engine(files)
        with files.open(rank_file(self.ranks.rank)) as file:
            torch.save({"rng": rng.capture(self.ranks.device), "carried": position.carried}, file)
        self._write_weights(files, position.step)
        records = self.ranks.gather(files.records)
        if self.ranks.first:
            self._commit(partial, final, position, records)
            retain(self.run_dir, config)
        self.ranks.barrier()
        return final

    def newest(self) -> tuple[Path | None, list[str]]:
        """The newest checkpoint that is whole, and why newer ones were passed over; the ranks share the reading.

        Those passed over are renamed: their steps will be taken again, and no damaged one may count as one to keep.
        """
        passed_over = []
        for checkpoint in self.ranks.from_first(committed(self.run_dir)):
            found = list(chain(*self.ranks.gather(damage(checkpoint, self.ranks.rank, self.ranks.world))))
            if not found:
                return checkpoint, passed_over
            passed_over.append(f"{checkpoint.name}: {found[0]}")
            if self.ranks.first:
                set_aside(checkpoint)
        return None, passed_over

    def load(self, checkpoint: Path, recipe: str | None = None) -> Position:
        """Put the engine and the generators where they were; raises CheckpointError for another run's checkpoint.

        `recipe`: the digest of the trunk's recipe, when the run branches off another.
        """
        manifest = read_manifest(checkpoint)
        self._require_same(checkpoint, manifest, {"recipe": recipe} if recipe else {})
        self.engine.load_checkpoint(str(checkpoint), tag=ENGINE)
        own = torch.load(checkpoint / rank_file(self.ranks.rank), map_location="cpu", weights_only=True)
        rng.restore(own["rng"], self.ranks.device)
        return Position(manifest["step"], manifest["tokens"], manifest["data"], own["carried"], manifest.get("skipped", 0))

    def _require_same(self, checkpoint: Path, manifest: dict[str, Any], otherwise: dict[str, Any]) -> None:
        saved = manifest["run"]
        if saved["world"] != self.ranks.world:
            raise CheckpointError(
                f"{checkpoint}: written by {saved['world']} ranks, now there are {self.ranks.world}: "
                f"resume on {saved['world']} ranks"
            )
        for key, wanted in json.loads(json.dumps({**self.identity, **otherwise})).items():
            if saved.get(key) != wanted:
                raise CheckpointError(f"{checkpoint}: of another run: {key} is {saved.get(key)!r}, here {wanted!r}")

    def _write_engine(self, files: Files) -> None:
        self._durable.files = files
        try:
            self.engine.save_checkpoint(str(files.root), tag=ENGINE, save_latest=False)
        finally:
            self._durable.files = None

    def _write_weights(self, files: Files, step: int) -> None:
        metadata = {"format": "pt", "step": str(step)}
        if not self.ranks.first:
            weights.write(self.engine.module, None, metadata)
            return
        with files.open(WEIGHTS) as file:
            weights.write(self.engine.module, file, metadata)

    def _commit(self, partial: Path, final: Path, position: Position, records: list[dict[str, FileRecord]]) -> None:
        for script in partial.glob("zero_to_*.py"):
            script.unlink()  # DeepSpeed's converters to full weights, which are there already
        files = {name: {**record, "rank": rank} for rank, own in enumerate(records) for name, record in own.items()}
        manifest = {
            "format": FORMAT,
            "step": position.step,
            "tokens": position.tokens,
            "data": position.data,
            "skipped": position.skipped,
            "run": {"world": self.ranks.world, **self.identity},
            "versions": versions(),
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "files": dict(sorted(files.items())),
        }
        with (partial / MANIFEST).open("w", encoding="utf-8") as file:
            json.dump(manifest, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        for path in {partial, *((partial / name).parent for name in files)}:
            sync_directory(path)
        partial.rename(final)
        sync_directory(final.parent)


class Checkpoints(Callback):
    """Takes a checkpoint every so many steps, and after the last."""

    def __init__(self, config: CheckpointConfig, snapshots: Snapshots, trainer: Trainer,
                 data_state: Callable[[int], dict[str, Any]], say: Callable[[str], None]) -> None:  # fmt: skip
        """`data_state`: the loader's state after a number of steps; `say`: how people are told."""
        self.config, self.snapshots, self.trainer = config, snapshots, trainer
        self.data_state, self.say = data_state, say

    def after_step(self, report: StepReport, last: bool) -> None:
        due = last or report.step in self.config.at or (self.config.every and report.step % self.config.every == 0)
        if not due:
            return
        start = time.perf_counter()
        position = Position(report.step, self.trainer.tokens, self.data_state(report.step), self.trainer.carried)
        path = self.snapshots.save(position, self.config)
        self.say(f"{report.step:>12} checkpoint {path} in {time.perf_counter() - start:.1f} s")
