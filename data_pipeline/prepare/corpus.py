"""Prepare a corpus: extract, deduplicate, split, train the tokenizer, encode, write shards and manifest.

The output depends only on the source and the settings: it has the same bytes for any number of workers, in processes or
over MPI ranks. Every stage leaves complete files only, so interrupted work continues where it stopped. The manifest is
written last: a directory with a manifest is complete.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from bst_base.errors import UserError
from bst_base.files import atomic_file, full_disk_explained, remove_partials
from bst_base.locks import flock
from data_pipeline.format.extents import file_of, to_bytes
from data_pipeline.format.manifest import MANIFEST, ExtentsInfo, Manifest, TokenizerInfo
from data_pipeline.format.packed import packed_name
from data_pipeline.format.shard_table import ShardTable
from data_pipeline.format.tokenizer import Tokenizer, parse_tokenizer, read_tokenizer, train_tokenizer
from data_pipeline.prepare.assemble import TOKENIZER, ShardDone, assign, deduplicate, shard_tasks, write_shard
from data_pipeline.prepare.config import PrepareConfig
from data_pipeline.prepare.field_check import FieldCheck
from data_pipeline.prepare.growth import Earlier
from data_pipeline.prepare.identity import check_same, check_there, given_tokenizer, identity, name_of
from data_pipeline.prepare.parallel import Workers
from data_pipeline.prepare.spool import (
    SPLITS,
    ChunkTask,
    Stamp,
    extract_chunk,
    group_parts,
    load_tables,
    merge_signatures,
    read_skipped,
    read_windows,
    refusal,
    skipped_record,
    stamps,
)
from data_pipeline.sources import Part, Skipped

SKIPPED = "skipped.jsonl"
WORK = "preparing"
"""Directory of unfinished work, in the output directory. It has one subdirectory for each set of settings."""

_CHUNK_BYTES = 8 << 20  # source bytes extracted by one task
_SHARD_NAME = re.compile(r"(train|validation|test)(-\d{6}\.(tar|idx|tokens)|\.extents)")
_WINDOW = 1 << 16  # bytes per window: the tokenizer is trained on a sample of such windows of the documents

Progress = Callable[[str, int, int], None]
"""Called with (the stage, the amount done, the total amount). The unit depends on the stage."""


def prepare(config: PrepareConfig, workers: Workers, progress: Progress) -> tuple[Manifest, dict[str, Any]]:
    """Prepare the corpus, or find that it is complete; return its manifest and which parts were there already.

    Raises UserError when the directory holds a corpus made from a different source or with different settings, and for
    every problem with the source.
    """
    _require_outside(config)
    earlier = _earlier(config)
    with config.source.in_use():
        return _prepare(config, earlier, workers, progress)


def _prepare(
    config: PrepareConfig, earlier: Earlier | None, workers: Workers, progress: Progress
) -> tuple[Manifest, dict[str, Any]]:
    """See `prepare`."""
    progress("fetch", 0, 1)
    config.source.fetch()
    progress("fetch", 1, 1)
    output = config.output.expanduser()
    given = given_tokenizer(config) if earlier is None else earlier.tokenizer()
    with full_disk_explained(output), _exclusive(output):
        listing = config.source.listing()
        groups = group_parts(listing.parts, _CHUNK_BYTES)
        found = [stamps(config.source, group) for group in groups]
        wanted = identity(config, groups, workers, progress)
        if earlier is not None:
            earlier.require_same(wanted)
            wanted["continues"] = earlier.history
        if (output / MANIFEST).exists():
            return _found(output, wanted), {"reused": True}
        if config.source.tokenized:
            config = config.model_copy(update={"source": config.source.with_tokenizer(given)})
        work = output / WORK / name_of(wanted)
        work.mkdir(parents=True, exist_ok=True)
        remove_partials(output)
        table, left_out = _extract(config, groups, found, listing.skipped, work, workers, progress)
        plan, duplicates = _plan(config, table, earlier, work, progress)
        tokenizer = _make_tokenizer(config, given, plan, work, progress)
        shards = _write_shards(config, plan, output, work, workers, progress)
        if earlier is not None:
            earlier.take_over(output)
        extents = _write_extents(shards, earlier, output)
        provenance = {**wanted, "left_out": left_out, "duplicates": duplicates}
        manifest = _manifest(shards, earlier, tokenizer, provenance, extents)
        _finish(manifest, output, work)
    return manifest, {
        "reused": False,
        "shards_already_there": sum(shard.was_there for shard in shards),
        **({} if earlier is None else {"shards_added": len(shards), "documents_added": len(plan)}),
    }


def _found(output: Path, wanted: dict[str, Any]) -> Manifest:
    """Return the manifest of a complete corpus; raises UserError if it was made from anything but what is wanted."""
    manifest = Manifest.read(output)
    check_same({key: manifest.provenance.get(key) for key in {**wanted, "continues": None}}, wanted, output)
    check_there(manifest, output)
    shutil.rmtree(output / WORK, ignore_errors=True)
    return manifest


def _require_outside(config: PrepareConfig) -> None:
    """Raise UserError when the output is inside the directory of the source: it would become a part of the source."""
    output, directory = config.output.expanduser(), config.source.directory()
    if directory is not None and output.resolve().is_relative_to(directory.resolve()):
        raise UserError(
            f"{output}: output is inside {directory}, the directory that the source reads, so that the corpus would be "
            "a part of its own source: give another output, outside of that directory"
        )


def _earlier(config: PrepareConfig) -> Earlier | None:
    """Return the corpus that is continued; raises UserError when the output would overwrite it."""
    if config.continues is None:
        return None
    directory = config.continues.expanduser()
    if directory.resolve() == config.output.expanduser().resolve():
        raise UserError(
            f"{directory}: output must differ from the corpus that it continues, because runs on that one still read "
            "it: give another output (on the same disk, shards are linked, not copied)"
        )
    return Earlier(directory)


def _finish(manifest: Manifest, output: Path, work: Path) -> None:
    """Move everything to its place, the manifest last. Remove other files that a preparation has left there."""
    with atomic_file(output / manifest.tokenizer.file) as file:
        file.write((work / TOKENIZER).read_bytes())
    shutil.move(work / SKIPPED, output / SKIPPED)
    shards = [info for infos in manifest.splits.values() for info in infos]
    own = {name for info in shards for name in (info.file, info.index, packed_name(info.file))}
    own |= {info.file for info in (manifest.extents or {}).values()}
    for path in output.iterdir():
        if _SHARD_NAME.fullmatch(path.name) and path.name not in own:  # of an attempt with other settings
            path.unlink()
    manifest.write(output)
    shutil.rmtree(output / WORK)


def _extract(
    config: PrepareConfig,
    groups: list[tuple[Part, ...]],
    found: list[list[Stamp]],
    beside: list[Skipped],
    work: Path,
    workers: Workers,
    progress: Progress,
) -> tuple[np.ndarray, dict[str, int]]:
    """Extract all documents into the spool; return their table, and how many were left out for each reason.

    `found`: the stamps of each group's files before they were hashed. `beside`: the files and records that the source
    skips without reading them.
    """
    spool = work / "spool"
    spool.mkdir(exist_ok=True)
    bad = _check_listed(beside, config)
    signatures = config.deduplicate.method == "minhash"
    settings = (config.text, signatures, config.on_bad_record)
    tasks = (
        ChunkTask(spool, number, config.source, group, *settings, stamp)
        for number, (group, stamp) in enumerate(zip(groups, found, strict=True))
    )
    done, total = 0, sum(part.size for group in groups for part in group)
    fields = FieldCheck(config.source)
    progress("extract", 0, total)
    for chunk in workers.run(extract_chunk, tasks):
        done, bad = done + chunk.size, bad + chunk.bad
        fields.add(chunk.fields, done)
        _check_limit(bad, spool, config)
        progress("extract", done, total)
    fields.require()
    table = load_tables(spool, len(groups))
    left_out: Counter[str] = Counter()
    with atomic_file(work / SKIPPED) as file:
        for skipped in (*map(skipped_record, beside), *read_skipped(spool, len(groups))):
            left_out[skipped["reason"].partition(" (")[0]] += skipped.get("count", 1)
            file.write(json.dumps(skipped, ensure_ascii=False).encode() + b"\n")
    if not len(table):
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        found = f"left out: {reasons}" if left_out else "nothing was found"
        raise UserError(f"the source {config.source.kind} holds no text ({found}); see {work / SKIPPED}")
    return table, dict(sorted(left_out.items()))


def _check_listed(beside: list[Skipped], config: PrepareConfig) -> int:
    """Return how many of the records in `beside` are bad.

    Raises UserError for the first one if the policy is to stop.
    """
    bad = [skipped for skipped in beside if skipped.bad]
    if bad and config.on_bad_record == "stop":
        raise refusal(bad[0])
    return len(bad)


def _check_limit(bad: int, spool: Path, config: PrepareConfig) -> None:
    if bad > config.bad_record_limit:
        raise UserError(
            f"{bad:,} bad records so far, more than bad_record_limit ({config.bad_record_limit:,}) allows: "
            f"is the source what you think it is? They are listed in {spool}/*/skipped.jsonl"
        )


def _plan(
    config: PrepareConfig, table: np.ndarray, earlier: Earlier | None, work: Path, progress: Progress
) -> tuple[np.ndarray, dict[str, int]]:
    """Decide where each document goes; return the plan and the number of duplicates.

    The plan is also written to work/plan.npy for the workers.
    """
    progress("deduplicate", 0, len(table))
    signatures = None
    if config.deduplicate.method == "minhash":
        signatures = merge_signatures(work / "spool", int(table["chunk"].max()) + 1)
    there = None if earlier is None else earlier.found_in(table["id"])
    kept = deduplicate(table, signatures, config.deduplicate, there)
    plan = assign(
        table,
        kept,
        validation_fraction=config.validation_fraction,
        shard_bytes=config.shard_bytes,
        seed=config.seed,
        earlier=there,
        shards={} if earlier is None else {SPLITS.index(s): len(of) for s, of in earlier.manifest.splits.items()},
    )
    if earlier is not None and not len(plan):
        raise UserError(f"{earlier.directory} holds all documents of the source already: there is nothing to add")
    if earlier is None and not (plan["split"] == SPLITS.index("train")).any():
        raise UserError("no document is left for the train split: give more text, or a smaller validation_fraction")
    with atomic_file(work / "plan.npy") as file:
        np.save(file, plan)
    progress("deduplicate", len(table), len(table))
    return plan, {"exact": kept.exact_duplicates, "near": kept.near_duplicates}


def _make_tokenizer(
    config: PrepareConfig, given: Tokenizer | None, plan: np.ndarray, work: Path, progress: Progress
) -> Tokenizer:
    """Return the tokenizer, made in the working directory.

    The one in the output directory may belong to other settings.
    """
    path = work / TOKENIZER
    if path.exists():
        return read_tokenizer(path)
    if given is not None:
        model = given.model
    else:
        train = plan[plan["split"] == SPLITS.index("train")]
        available = int(train["bytes"].sum())
        sample = min(available, config.tokenizer.sample_bytes)
        progress("train tokenizer", 0, sample)
        model = train_tokenizer(read_windows(work / "spool", train, _WINDOW, sample / available), config.tokenizer)
        progress("train tokenizer", sample, sample)
    tokenizer = parse_tokenizer(model, str(path))
    with atomic_file(path) as file:
        file.write(model)
    return tokenizer


def _write_shards(
    config: PrepareConfig, plan: np.ndarray, output: Path, work: Path, workers: Workers, progress: Progress
) -> list[ShardDone]:
    tasks = shard_tasks(plan, output, work, config.source)
    sizes = {(task.split, task.number): int(plan["bytes"][task.start : task.stop].sum()) for task in tasks}
    done, total = 0, sum(sizes.values())
    progress("encode", 0, total)
    shards = []
    for shard in workers.run(write_shard, tasks):
        shards.append(shard)
        done += sizes[shard.split, shard.number]
        progress("encode", done, total)
    return sorted(shards, key=lambda shard: (SPLITS.index(shard.split), shard.number))


def _write_extents(shards: list[ShardDone], earlier: Earlier | None, output: Path) -> dict[str, ExtentsInfo]:
    """Write the extents of each split's shards next to the shards."""
    extents = {} if earlier is None else {split: list(before) for split, before in earlier.extents.items()}
    for shard in shards:
        extents.setdefault(shard.split, []).append(shard.extents)
    written = {}
    for split, rows in extents.items():
        data = to_bytes(rows)
        with atomic_file(output / file_of(split)) as file:
            file.write(data)
        written[split] = ExtentsInfo(file=file_of(split), sha256=hashlib.sha256(data).hexdigest())
    return written


def _manifest(
    shards: list[ShardDone],
    earlier: Earlier | None,
    tokenizer: Tokenizer,
    provenance: dict[str, Any],
    extents: dict[str, ExtentsInfo],
) -> Manifest:
    splits: dict[str, list[Any]] = {"train": [], "validation": []}
    licences: Counter[str] = Counter()
    if earlier is not None:
        splits |= {split: list(before) for split, before in earlier.manifest.splits.items()}
        licences.update(earlier.manifest.licences)
    for shard in shards:
        splits.setdefault(shard.split, []).append(shard.info)
        licences.update(shard.licences)
    return Manifest(
        tokenizer=TokenizerInfo(
            file=tokenizer.file,
            sha256=tokenizer.sha256,
            vocab_size=tokenizer.vocab_size,
            bos_id=tokenizer.bos_id,
            eos_id=tokenizer.eos_id,
            pad_id=tokenizer.pad_id,
        ),
        dtype="uint16" if tokenizer.dtype.itemsize == 2 else "uint32",
        splits={split: ShardTable(infos) for split, infos in splits.items()},
        extents=extents,
        provenance=provenance,
        licences=dict(sorted(licences.items())),
    )


@contextmanager
def _exclusive(output: Path) -> Iterator[None]:
    """Lock the directory: only one preparation writes to it at a time."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        file = (output / ".lock").open("w")
    except OSError as error:
        raise UserError(f"{output}: cannot be written: {error.strerror}; choose another output") from None
    with file:
        if not flock(file, output / ".lock"):
            raise UserError(f"{output}: another preparation is writing there; wait for it to end")
        yield
