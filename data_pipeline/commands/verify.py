"""Verify a prepared corpus: every hash and CRC, the tokenizer, and that unmodified webdataset reads every document.

    bst data verify corpora/stdlib

Exit status: 1 if anything is wrong; each line names the file, the document and the byte.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.text import Text

from bst_base.arguments import at_least
from data_pipeline.commands.directory import corpus_directory
from data_pipeline.format.manifest import Manifest
from data_pipeline.format.verify import Problem, VerifyTask, verify_extents, verify_shard, verify_tokenizer
from data_pipeline.prepare.parallel import open_workers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("corpus", type=corpus_directory, help="directory of a prepared corpus")
    parser.add_argument("--workers", metavar="N", type=at_least(1), help="processes (default: one for each CPU)")


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    """Verify and report; `passed` is false when there is a problem."""
    manifest = Manifest.read(args.corpus)
    shards = [shard for infos in manifest.splits.values() for shard in infos]
    tasks = [VerifyTask(args.corpus, shard, manifest.tokenizer.vocab_size, manifest.dtype) for shard in shards]
    console = Console()
    start = time.monotonic()
    problems: list[Problem] = verify_tokenizer(args.corpus, manifest)
    problems += verify_extents(args.corpus, manifest)
    with open_workers(args.workers) as workers:
        if workers is None:
            return None
        results = workers.run(verify_shard, tasks)
        for found in track(results, "verify", total=len(tasks), console=console, transient=True):
            problems += found
    problems.sort()
    for problem in problems:
        console.print(Text.assemble((problem.file, "red"), f": {problem.what}"), soft_wrap=True)
    size = sum(shard.bytes for shard in shards)
    verdict = (f"{len(problems)} problem{'s' * (len(problems) > 1)}", "red") if problems else ("whole", "green")
    found = f"{args.corpus}: {len(shards)} shard{'s' * (len(shards) != 1)}, {size / 1e6:.1f} MB: "
    console.print(Text.assemble(found, verdict), soft_wrap=True)
    return {
        "passed": not problems,
        "corpus": str(args.corpus),
        "manifest_sha256": manifest.sha256,
        "shards": len(shards),
        "tar_bytes": size,
        "time_s": round(time.monotonic() - start, 3),
        "problems": [problem._asdict() for problem in problems],
    }
