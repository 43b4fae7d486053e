"""Prepare a corpus: real text to SentencePiece tokens in WebDataset shards, with an index and a manifest.

    bst data prepare launch/data/stdlib.yaml
    bst data prepare CONFIG output=/data/mine tokenizer.vocab_size=16000 workers=8
    mpirun -n 65 bst data prepare CONFIG        # over nodes: one rank leads, the others work

When started again, it continues interrupted work; a finished corpus is reused.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from resource import RUSAGE_CHILDREN, RUSAGE_SELF, getrusage
from textwrap import fill
from typing import Any

from rich.console import Console

from bst_base.settings import fields, load
from bst_base.shipped import CORPORA, find
from bst_base.terminal import Sheet, print_table, say
from data_pipeline.commands.progress import stages
from data_pipeline.format.manifest import Manifest
from data_pipeline.format.tokenizer import read_tokenizer
from data_pipeline.prepare.config import PrepareConfig
from data_pipeline.prepare.corpus import SKIPPED, prepare
from data_pipeline.prepare.parallel import open_workers

_INDENT = {"width": 100, "initial_indent": "      ", "subsequent_indent": "      "}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments. The help ends with every setting of the YAML file."""
    parser.add_argument(
        "config", metavar="CONFIG", type=Path, help="the corpus's YAML file, or the name of one of launch/data/"
    )
    parser.add_argument("override", nargs="*", metavar="section.field=value", help="settings to change")
    settings = (f"  {name} ({default})\n{fill(text, **_INDENT)}" for name, _, default, text in fields(PrepareConfig))
    parser.epilog = "settings and their defaults:\n" + "\n".join(settings)


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    """Prepare and report; return None on MPI ranks that only serve as workers."""
    config = load(PrepareConfig, find(args.config, CORPORA), args.override)
    with open_workers(config.workers) as workers:
        if workers is None:
            return None
        console = Console()
        start = time.monotonic()
        with stages(console) as progress:
            manifest, found = prepare(config, workers, progress)
        time_s = time.monotonic() - start
    cpu_s = sum(getrusage(who).ru_utime + getrusage(who).ru_stime for who in (RUSAGE_SELF, RUSAGE_CHILDREN))
    report = {"corpus": str(config.output), **found, "workers": workers.count, **summary(manifest)}
    if config.tokenizer.added:
        report |= {"added_tokens": _added(config, manifest)}
    report |= {"time_s": round(time_s, 3), "stage_time_s": progress.seconds()}
    report |= {"cpu_s": round(cpu_s, 3), "stage_cpu_s": progress.cpu_seconds()}
    _print(console, config, manifest, report)
    return report


def summary(manifest: Manifest) -> dict[str, Any]:
    """Return the numbers of a manifest, by split."""
    splits = {
        split: {
            "documents": manifest.documents(split),
            "tokens": manifest.tokens(split),
            "text_bytes": manifest.text_bytes(split),
            "bytes_per_token": round(manifest.text_bytes(split) / max(manifest.tokens(split), 1), 4),
            "shards": len(shards),
        }
        for split, shards in manifest.splits.items()
    }
    return {"manifest_sha256": manifest.sha256, "vocab_size": manifest.tokenizer.vocab_size, "splits": splits}


def _added(config: PrepareConfig, manifest: Manifest) -> dict[str, int]:
    """Return the ids of the tokens that the settings add."""
    tokenizer = read_tokenizer(config.output.expanduser() / manifest.tokenizer.file)
    ids = {tokenizer.piece(token): token for token in range(tokenizer.vocab_size)}
    return {name: ids[name] for name in config.tokenizer.added}


def split_table(splits: dict[str, dict[str, Any]]) -> Sheet:
    """Return the numbers of `summary` as a table."""
    rows = []
    for split, n in splits.items():
        known = n["text_bytes"] or not n["tokens"]  # unknown if the ids came without a tokenizer
        size, ratio = (f"{n['text_bytes'] / 1e6:,.1f}", f"{n['bytes_per_token']:.3f}") if known else ("–", "–")
        rows.append([split, f"{n['documents']:,}", f"{n['tokens']:,}", size, ratio, str(n["shards"])])
    return Sheet(("split", "documents", "tokens", "text MB", "bytes/token", "shards"), rows)


def _print(console: Console, config: PrepareConfig, manifest: Manifest, report: dict[str, Any]) -> None:
    if report["reused"]:
        say(f"{config.output} is already prepared with these settings: reused as it is.", console)
    else:
        there = report["shards_already_there"]
        again = f", {there} shards reused" if there else ""
        if config.continues is not None:
            again += (
                f"; documents added: {report['documents_added']:,}, in new shards: {report['shards_added']}; "
                f"the rest kept from {config.continues}"
            )
        say(f"{config.output} prepared in {report['time_s']:.1f} s{again}.", console)
    print_table(split_table(report["splits"]))
    if added := report.get("added_tokens"):
        say(f"added tokens: {', '.join(f'{name} {token}' for name, token in added.items())}", console)
    left_out, duplicates = manifest.provenance["left_out"], manifest.provenance["duplicates"]
    if left_out:
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        say(f"left out: {reasons} (listed in {config.output / SKIPPED})", console)
    say(f"duplicates removed: {duplicates['exact']} exact, {duplicates['near']} near", console)
