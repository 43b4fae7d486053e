"""Write a prepared corpus in another format: Megatron-LM's .bin and .idx, or Parquet.

    bst data export corpora/stdlib exported/megatron --format megatron
    bst data export corpora/stdlib exported/parquet --format parquet

For Megatron-LM it writes SPLIT.bin and SPLIT.idx, each document with its end token; for Parquet, one file per shard
with one row per document: its text and metadata. The tokenizer is copied beside them (for Parquet, into the folder
_tokenizer). The output folder appears only when it is complete.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from rich.console import Console

from bst_base.arguments import at_least
from bst_base.errors import UserError
from bst_base.files import atomic_directory
from bst_base.terminal import Sheet, print_table
from data_pipeline.commands.directory import corpus_directory
from data_pipeline.commands.progress import stages
from data_pipeline.format.exports import ExportTask, write_megatron, write_parquet
from data_pipeline.format.manifest import Manifest
from data_pipeline.format.tokenizer import read_tokenizer
from data_pipeline.prepare.parallel import Workers, open_workers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("corpus", type=corpus_directory, help="directory of a prepared corpus")
    parser.add_argument("output", metavar="FOLDER", type=Path, help="folder to write; must not exist")
    parser.add_argument("--format", choices=["megatron", "parquet"], required=True, help="format to write")
    parser.add_argument("--workers", metavar="N", type=at_least(1), help="processes (default: one for each CPU)")


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    """Write the export and report what is in it."""
    manifest = Manifest.read(args.corpus)
    if args.output.exists():
        raise UserError(f"{args.output} already exists; choose another folder, or delete it first")
    tokenizer = args.corpus / manifest.tokenizer.file
    read_tokenizer(tokenizer, manifest.tokenizer.sha256)  # a different tokenizer would give different texts
    console = Console()
    with open_workers(args.workers) as workers:
        if workers is None:
            return None
        args.output.parent.mkdir(parents=True, exist_ok=True)
        with atomic_directory(args.output) as folder:
            splits = _write(args, manifest, folder, workers, console)
            # Parquet readers take every file of a folder as a table, but skip names that begin with an underscore.
            beside = folder / "_tokenizer" if args.format == "parquet" else folder
            beside.mkdir(exist_ok=True)
            shutil.copyfile(tokenizer, beside / tokenizer.name)
    rows = [[split, f"{found['documents']:,}", f"{found['tokens']:,}"] for split, found in splits.items()]
    print_table(
        Sheet(("split", "documents", "tokens"), rows), f"{args.output} written for {args.format} from {args.corpus}."
    )
    return {"corpus": str(args.corpus), "output": str(args.output), "format": args.format, "splits": splits}


def _write(
    args: argparse.Namespace, manifest: Manifest, folder: Path, workers: Workers, console: Console
) -> dict[str, dict[str, int]]:
    """Write all splits; return the documents and tokens of each."""
    if args.format == "megatron":  # one stream each
        write, shards = write_megatron, [(split, 0) for split, infos in manifest.splits.items() if infos]
    else:
        write = write_parquet
        shards = [(split, number) for split, infos in manifest.splits.items() for number in range(len(infos))]
    tasks = [ExportTask(args.corpus, folder, *shard) for shard in shards]
    splits = {split: {"documents": 0, "tokens": 0} for split, _ in shards}
    with stages(console) as told:
        told("export", 0, len(tasks))
        for done, found in enumerate(workers.run(write, tasks), start=1):
            splits[found.split]["documents"] += found.documents
            splits[found.split]["tokens"] += found.tokens
            told("export", done, len(tasks))
    return splits
