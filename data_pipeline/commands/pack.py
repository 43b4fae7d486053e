"""Write the packed files that a corpus lacks, so that rows of short documents can be read fast.

    bst data pack corpora/stdlib

`bst data prepare` writes them itself; use this for corpora from before it did, or from a store. The corpus stays the
same: its manifest does not name these files, and runs on it can continue. Each shard is first compared with its
SHA-256.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import track

from bst_base.arguments import at_least
from bst_base.errors import UserError
from bst_base.terminal import say
from data_pipeline.commands.directory import corpus_directory
from data_pipeline.format.manifest import Manifest, sha256_file
from data_pipeline.format.packed import packed_damage, write_packed
from data_pipeline.format.shard_table import ShardInfo
from data_pipeline.format.shards import ShardIndex
from data_pipeline.prepare.parallel import open_workers


class PackTask(NamedTuple):
    """The data that a worker needs to write the packed file of one shard."""

    corpus: Path
    shard: ShardInfo


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("corpus", type=corpus_directory, help="directory of a prepared corpus")
    parser.add_argument("--workers", metavar="N", type=at_least(1), help="processes (default: one for each CPU)")


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    """Write the packed files that are missing or damaged, and report their number."""
    manifest, console = Manifest.read(args.corpus), Console()
    tasks = [PackTask(args.corpus, shard) for shards in manifest.splits.values() for shard in shards]
    with open_workers(args.workers) as workers:
        if workers is None:
            return None
        results = workers.run(pack_shard, tasks)
        written = sum(track(results, "pack", total=len(tasks), console=console, transient=True))
    say(f"{args.corpus}: {written} packed files written, for {len(tasks)} shards", console)
    return {"corpus": str(args.corpus), "shards": len(tasks), "written": written}


def pack_shard(task: PackTask) -> bool:
    """Write the packed file if it is missing or damaged; return whether it was written.

    Raises UserError when the shard is not the one that the manifest names.
    """
    tar, index_path = task.corpus / task.shard.file, task.corpus / task.shard.index
    index = ShardIndex.read(index_path)
    named = index.tar_sha256 == task.shard.sha256 and sha256_file(index_path) == task.shard.index_sha256
    whole = named and tar.is_file() and tar.stat().st_size == task.shard.bytes
    if not whole or sha256_file(tar) != task.shard.sha256:  # its tokens would get valid CRCs, whatever they are
        raise UserError(f"{tar}: missing, damaged, cut short or of another index; see 'bst data verify {task.corpus}'")
    return packed_damage(tar, index) is not None and write_packed(tar, index)
