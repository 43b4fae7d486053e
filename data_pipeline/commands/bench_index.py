"""Measure how memory per rank and time to the first batch grow with the size of a corpus.

    bst bench index                                  # 10^6, 10^7 and 10^9 documents on this machine's disk
    bst bench index --documents 1e9 --isolated       # every document padded to the block
    bst bench index --documents 1e9 --latency-ms 40  # from a server on the loopback that takes 40 ms to answer
    bst bench index --documents 1e9 --latency-ms 40 --cache
    bst bench index --documents 1e9 --ranks 4        # on one machine, each with its own rows

All shards of these corpora share one shard's bytes, so a billion documents need no disk. They are read by the usual
code, in one process per rank. Memory is the growth of a process since before the corpus was opened; ranks share none of
it. After the first batch a rank takes steps of 32,768 tokens at the given speed, and the share of time that it waits
for data is shown. With several ranks the largest value of each figure is shown.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from rich.console import Console

from bst_base.arguments import at_least, seconds
from bst_base.errors import UserError
from bst_base.terminal import Sheet, print_table, say
from data_pipeline.bench.endless import make_endless
from data_pipeline.bench.opening import MEETINGS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--documents",
        nargs="+",
        metavar="N",
        type=_count,
        default=[10**6, 10**7, 10**9],
        help="documents of the corpora (default: 1e6 1e7 1e9)",
    )
    parser.add_argument("--per-shard", metavar="N", type=_count, default=10_000, help="documents of a shard")
    parser.add_argument("--mean", metavar="TOKENS", type=_count, default=300, help="mean length of a document")
    parser.add_argument("--isolated", action="store_true", help="serve isolated documents; else they are joined")
    parser.add_argument(
        "--latency-ms", metavar="MS", type=at_least(0), help="read over HTTP, with this delay per answer"
    )
    parser.add_argument("--cache", action="store_true", help="with --latency-ms: fetch whole shards into a cache")
    parser.add_argument("--ranks", metavar="N", type=_count, default=1, help="ranks of this machine (default 1)")
    parser.add_argument("--tokens-per-s", metavar="N", type=_count, default=500_000, help="speed of the trainer")
    parser.add_argument("--seconds", metavar="S", type=seconds, default=20.0, help="how long it reads")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure each size, print the table."""
    if args.cache and args.latency_ms is None:
        raise UserError("--cache is only for reads over a network; add --latency-ms")
    console = Console()
    found = []
    for documents in args.documents:
        with tempfile.TemporaryDirectory() as folder:
            console.print(f"[dim]{documents:,} documents[/]", highlight=False)
            corpus = Path(folder) / "corpus"
            make_endless(corpus, documents, args.per_shard, args.mean, linked=args.latency_ms is None)
            size = (corpus / "manifest.json").stat().st_size / 1e6
            found.append({"manifest_mb": size, **_measured(args, corpus, Path(folder) / "cache")})
    _print(found)
    return {"documents": "isolated" if args.isolated else "joined", "latency_ms": args.latency_ms, "sizes": found}


def _count(text: str) -> int:
    """Parse a whole number, also one like 1e9."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not math.isfinite(value) or value != int(value) or value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(value)


def _measured(args: argparse.Namespace, corpus: Path, cache: Path) -> dict[str, Any]:
    """Measure one corpus. With a server, add the number of its requests by file ending."""
    options = ["--documents", "isolated" if args.isolated else "joined"]
    options += ["--tokens-per-s", str(args.tokens_per_s), "--seconds", str(args.seconds)]
    if args.latency_ms is None:
        return _of_ranks(args.ranks, str(corpus), *options)
    with _server(corpus, args.latency_ms) as url:
        found = _of_ranks(args.ranks, url, *options, *(["--cache", str(cache)] if args.cache else []))
        with urllib.request.urlopen(f"{url}/requests") as answer:
            return found | {"requests": json.load(answer)}


@contextmanager
def _server(corpus: Path, latency_ms: float) -> Iterator[str]:
    command = [sys.executable, "-m", "data_pipeline.bench.server", str(corpus), "--latency-ms", str(latency_ms)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        try:
            yield f"http://127.0.0.1:{server.stdout.readline().strip()}"
        finally:
            server.stdin.close()


def _of_ranks(count: int, *arguments: str) -> dict[str, Any]:
    """Measure on `count` ranks at the same time; return the largest value of each figure."""
    command = [sys.executable, "-m", "data_pipeline.bench.opening", *arguments, "--ranks", str(count)]
    with ExitStack() as stack:
        ranks = [stack.enter_context(_started([*command, "--rank", str(rank)])) for rank in range(count)]
        for _ in range(MEETINGS):
            for rank in ranks:
                rank.line()
            for rank in ranks:
                rank.process.stdin.write("\n")
                rank.process.stdin.flush()
        found = [json.loads(rank.line()) for rank in ranks]
    return {name: max(each[name] for each in found) for name in found[0]} | {"ranks": count}


class _Rank(NamedTuple):
    process: subprocess.Popen[str]
    errors: IO[str]

    def line(self) -> str:
        """Return its next line of output; raises UserError with its error output if it has ended."""
        if line := self.process.stdout.readline():
            return line
        self.errors.seek(0)
        raise UserError(f"measuring failed:\n{self.errors.read().strip()[-2000:]}")


@contextmanager
def _started(command: list[str]) -> Iterator[_Rank]:
    """Start a rank. It is killed when the measurement ends, for whatever reason."""
    pipe = subprocess.PIPE
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=errors, text=True) as process,
    ):
        try:
            yield _Rank(process, errors)
        finally:
            process.kill()


def _print(found: list[dict[str, Any]]) -> None:
    rows = []
    for each in found:
        memory = max(each["private_mb"], each["private_mb_at_end"])
        rows.append(
            [
                f"{each['documents']:,}",
                f"{each['shards']:,}",
                f"{each['tokens']:.1e}",
                f"{each['manifest_mb']:.1f}",
                f"{each['first_batch_s']:.1f}",
                f"{memory:.0f}",
                f"{each['waited']:.1%}" if "waited" in each else "-",
            ]
        )
    columns = ("documents", "shards", "tokens", "manifest MB", "first batch s", "MB per rank", "waiting")
    print_table(Sheet(columns, rows))
    for each in found:
        if requests := each.get("requests"):
            answered = ", ".join(f"{count:,} of {name}" for name, count in sorted(requests.items()))
            say(f"{each['documents']:,} documents: {answered}")
