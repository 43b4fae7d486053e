"""Upload a prepared corpus to an object store.

    bst data push corpora/stdlib s3://bucket/stdlib
    bst data push corpora/stdlib-2 s3://bucket/stdlib --grow      # only the new files of a corpus that continues it

Then runs, `bst plan` and `bst baselines` accept the address in place of the directory; the commands of `bst data` read
directories. Every file is checked
against its SHA-256 before it is sent, and the manifest is sent last: an interrupted push leaves no corpus there, and
the next one sends what is missing. Credentials come from where the store's client looks for them (for S3: AWS_…).
"""

from __future__ import annotations

import argparse
from typing import Any

from rich.console import Console

from bst_base.terminal import say
from data_pipeline.commands.directory import corpus_directory
from data_pipeline.commands.progress import stages
from data_pipeline.store.push import push


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("corpus", type=corpus_directory, help="directory of a prepared corpus")
    parser.add_argument("url", metavar="URL", help="where to: s3://bucket/corpus, gs://…, file:///path")
    parser.add_argument(
        "--grow",
        action="store_true",
        help="replace a corpus there that this one continues; files that both have are not sent again",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Send the missing files, and report them."""
    console = Console()
    with stages(console) as told:
        sent = push(args.corpus, args.url, args.grow, lambda done, total: told("push", done, total))
    there = f", {sent.already_there} were there already" if sent.already_there else ""
    say(f"{args.corpus}: {sent.files} files sent, {sent.bytes / 1e6:,.1f} MB{there}.", console)
    return {"corpus": str(args.corpus), **sent._asdict()}
