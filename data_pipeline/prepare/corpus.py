"""Prepare a corpus: extract, deduplicate, split, train the tokenizer, encode, write shards and manifest.

The output depends on the source and the settings alone: the same bytes for any number of workers, in processes or over
MPI ranks. Every step leaves whole files only, so work that was interrupted goes on where it stopped; the manifest comes
last, and a directory with a manifest is complete.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from bst_base.errors import UserError
from bst_base.files import atomic_file, full_disk_explained, remove_partials
from bst_base.settings import Config
from data_pipeline.format.manifest import MANIFEST, Manifest, TokenizerInfo
from data_pipeline.format.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer
from data_pipeline.prepare.assemble import ShardDone, assign, deduplicate, shard_tasks, write_shard
from data_pipeline.prepare.dedup import DedupConfig
from data_pipeline.prepare.parallel import Workers
from data_pipeline.prepare.spool import (
    SPLITS,
    ChunkTask,
    extract_chunk,
    group_parts,
    load_tables,
    merge_signatures,
    read_skipped,
    read_windows,
)
from data_pipeline.prepare.text import TextConfig
from data_pipeline.sources import AnySource, Part

TOKENIZER = "tokenizer.model"
SKIPPED = "skipped.jsonl"

_CHUNK_BYTES = 8 << 20  # source bytes extracted by one task
_WINDOW = 1 << 16  # bytes of a document sampled together for the tokenizer

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, how much of it is done, how much there is), in a unit of the stage's own."""


class PrepareConfig(Config):
    """One corpus: what it is made from, and how. One YAML file is one of these."""

    source: AnySource
    """Where the text comes from: `kind` and the settings of that kind (see `bst data sources`)."""
    output: Path
    """Directory of the prepared corpus."""
    text: TextConfig = TextConfig()
    """What is done to the text first."""
    deduplicate: DedupConfig = DedupConfig()
    """What counts as a duplicate."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    """How the tokenizer is made."""
    validation_fraction: float = Field(0.05, ge=0.0, lt=1.0)
    """Share of the clusters of documents that go to validation, unless the source says which do."""
    shard_bytes: int = Field(64 << 20, ge=1)
    """Bytes of text in a shard: the unit of parallel work, and of what is done again after an interruption."""
    seed: int = 0
    """Decides which clusters go to validation."""
    workers: int | None = Field(None, ge=1)
    """Processes; by default one for each CPU. Under `mpirun -n N`: N - 1 ranks work, whatever is said here."""


def prepare(config: PrepareConfig, workers: Workers, progress: Progress) -> tuple[Manifest, dict[str, Any]]:
    """Prepare the corpus, or find it prepared; returns its manifest and what was found there already.

    Raises UserError when the directory holds a corpus made from anything else, and for anything wrong with the source.
    """
    progress("fetch", 0, 1)
    config.source.fetch()
    progress("fetch", 1, 1)
    parts = config.source.parts()
    identity = _identity(config, parts)
    output = config.output.expanduser()
    work = output / "preparing"
    with full_disk_explained(output), _exclusive(output):
        if (output / MANIFEST).exists():
            manifest = Manifest.read(output)
            _check_same({key: manifest.provenance.get(key) for key in identity}, identity, output)
            shutil.rmtree(work, ignore_errors=True)
            return manifest, {"reused": True}
        work.mkdir(exist_ok=True)
        _begin(work, identity)
        remove_partials(output)
        table, left_out = _extract(config, parts, work, workers, progress)
        plan, duplicates = _plan(config, table, work, progress)
        tokenizer = _make_tokenizer(config, plan, output, work, progress)
        shards = _write_shards(config, plan, output, work, workers, progress)
        manifest = _manifest(shards, tokenizer, {**identity, "left_out": left_out, "duplicates": duplicates})
        shutil.move(work / SKIPPED, output / SKIPPED)
        manifest.write(output)
        shutil.rmtree(work)
    return manifest, {"reused": False, "shards_already_there": sum(shard.was_there for shard in shards)}


def _identity(config: PrepareConfig, parts: list[Part]) -> dict[str, Any]:
    """What decides the bytes of the corpus, without anything that names a machine or its directories."""
    settings = config.model_dump(mode="json", exclude={"output": True, "workers": True, "source": {"path"}})
    if config.tokenizer.reuse is not None:
        settings["tokenizer"] = {"reuse": _reused(config.tokenizer.reuse).sha256}
    listing = hashlib.sha256("".join(f"{part.size} {part.name}\n" for part in parts).encode()).hexdigest()
    source = {**config.source.provenance(), "parts": len(parts), "listing_sha256": listing}
    return {"settings": settings, "source": source, "sentencepiece": version("sentencepiece")}


def _begin(work: Path, identity: dict[str, Any]) -> None:
    """Mark the working directory with what is being made, or check that it is the same as what is there."""
    mark = work / "identity.json"
    if mark.exists():
        _check_same(json.loads(mark.read_bytes()), identity, work.parent)
        return
    with atomic_file(mark) as file:
        file.write(json.dumps(identity).encode())


def _check_same(found: dict[str, Any], wanted: dict[str, Any], output: Path) -> None:
    differences = [f"{name}: {old!r} there, {new!r} now" for name, old, new in _differences(found, wanted)]
    if differences:
        raise UserError(
            f"{output} holds a corpus made otherwise ({'; '.join(differences)}): choose another output, or delete it"
        )


def _differences(found: Any, wanted: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in sorted({*found, *wanted}):
            yield from _differences(found.get(key), wanted.get(key), f"{name}.{key}" if name else key)
    elif found != wanted:
        yield name, found, wanted


def _extract(
    config: PrepareConfig, parts: list[Part], work: Path, workers: Workers, progress: Progress
) -> tuple[np.ndarray, dict[str, int]]:
    """All documents into the spool: their table, and how many were left out for which reason."""
    spool = work / "spool"
    spool.mkdir(exist_ok=True)
    groups = group_parts(parts, _CHUNK_BYTES)
    signatures = config.deduplicate.method == "minhash"
    tasks = (ChunkTask(spool, i, config.source, group, config.text, signatures) for i, group in enumerate(groups))
    done, total = 0, sum(part.size for part in parts)
    progress("extract", 0, total)
    for size in workers.run(extract_chunk, tasks):
        done += size
        progress("extract", done, total)
    table = load_tables(spool, len(groups))
    left_out: Counter[str] = Counter()
    with atomic_file(work / SKIPPED) as file:
        for skipped in read_skipped(spool, len(groups)):
            left_out[skipped["reason"].partition(" (")[0]] += 1
            file.write(json.dumps(skipped, ensure_ascii=False).encode() + b"\n")
    if not len(table):
        found = f"{sum(left_out.values())} left out: {dict(left_out)}" if left_out else "nothing was found"
        raise UserError(f"the source {config.source.kind} holds no text ({found}); see {work / SKIPPED}")
    return table, dict(sorted(left_out.items()))


def _plan(
    config: PrepareConfig, table: np.ndarray, work: Path, progress: Progress
) -> tuple[np.ndarray, dict[str, int]]:
    """Which document goes where, also written to work/plan.npy for the workers; and how many were duplicates."""
    progress("deduplicate", 0, len(table))
    signatures = None
    if config.deduplicate.method == "minhash":
        signatures = merge_signatures(work / "spool", int(table["chunk"].max()) + 1)
    kept = deduplicate(table, signatures, config.deduplicate)
    plan = assign(
        table,
        kept,
        validation_fraction=config.validation_fraction,
        shard_bytes=config.shard_bytes,
        seed=config.seed,
    )
    if not (plan["split"] == SPLITS.index("train")).any():
        raise UserError("no document is left for the train split: give more text, or a smaller validation_fraction")
    with atomic_file(work / "plan.npy") as file:
        np.save(file, plan)
    progress("deduplicate", len(table), len(table))
    return plan, {"exact": kept.exact_duplicates, "near": kept.near_duplicates}


def _make_tokenizer(config: PrepareConfig, plan: np.ndarray, output: Path, work: Path, progress: Progress) -> Tokenizer:
    path = output / TOKENIZER
    if path.exists():
        return Tokenizer.read(path)
    if config.tokenizer.reuse is not None:
        model = _reused(config.tokenizer.reuse).model
    else:
        train = plan[plan["split"] == SPLITS.index("train")]
        available = int(train["bytes"].sum())
        sample = min(available, config.tokenizer.sample_bytes)
        progress("train tokenizer", 0, sample)
        model = train_tokenizer(read_windows(work / "spool", train, _WINDOW, sample / available), config.tokenizer)
        progress("train tokenizer", sample, sample)
    tokenizer = Tokenizer(model, str(path))
    with atomic_file(path) as file:
        file.write(model)
    return tokenizer


def _reused(path: Path) -> Tokenizer:
    path = path.expanduser()
    return Tokenizer.read(path / Manifest.read(path).tokenizer.file if path.is_dir() else path)


def _write_shards(
    config: PrepareConfig, plan: np.ndarray, output: Path, work: Path, workers: Workers, progress: Progress
) -> list[ShardDone]:
    tasks = shard_tasks(plan, output, work, config.source.kind)
    done, total = 0, int(plan["bytes"].sum())
    progress("encode", 0, total)
    shards = []
    for shard in workers.run(write_shard, tasks):
        shards.append(shard)
        done += shard.info.text_bytes
        progress("encode", done, total)
    return sorted(shards, key=lambda shard: (SPLITS.index(shard.split), shard.number))


def _manifest(shards: list[ShardDone], tokenizer: Tokenizer, provenance: dict[str, Any]) -> Manifest:
    splits: dict[str, list[Any]] = {"train": [], "validation": []}
    licences: Counter[str] = Counter()
    for shard in shards:
        splits.setdefault(shard.split, []).append(shard.info)
        licences.update(shard.licences)
    return Manifest(
        tokenizer=TokenizerInfo(
            file=TOKENIZER,
            sha256=tokenizer.sha256,
            vocab_size=tokenizer.vocab_size,
            bos_id=tokenizer.bos_id,
            eos_id=tokenizer.eos_id,
            pad_id=tokenizer.pad_id,
        ),
        dtype="uint16" if tokenizer.dtype.itemsize == 2 else "uint32",
        splits={split: tuple(infos) for split, infos in splits.items()},
        provenance=provenance,
        licences=dict(sorted(licences.items())),
    )


@contextmanager
def _exclusive(output: Path) -> Iterator[None]:
    """One preparation of a directory at a time."""
    output.mkdir(parents=True, exist_ok=True)
    with (output / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{output}: another preparation is writing there; wait for it to end") from None
        yield
