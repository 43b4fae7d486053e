"""Statistics of a prepared corpus: documents, tokens, lengths, bytes per token, duplicates, overlap between splits.

    bst data stats corpora/stdlib
    bst data stats corpora/stdlib --png lengths.png     # also draw the histogram of lengths
    bst data stats corpora/large --quick                # only from the manifest and the indexes
    bst data stats corpora/stdlib --quick --length 4096 # documents cut by sequences of 4,096 tokens

Overlap is the share of 32-token runs of the validation split that also occur in the training split. Ctrl-C stops
reading tokens and prints what --quick prints.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from bst_base.arguments import at_least, picture
from bst_base.outputs import write_afterwards
from bst_base.stopping import INTERRUPTED
from bst_base.terminal import Sheet, print_table, say
from data_pipeline.commands.directory import corpus_directory
from data_pipeline.commands.prepare import split_table, summary
from data_pipeline.commands.progress import stages
from data_pipeline.format.extents import extents
from data_pipeline.format.manifest import Manifest
from data_pipeline.format.stats import (
    NGRAM,
    ScanTask,
    document_lengths,
    held_out,
    length_histogram,
    overlap,
    sample_runs,
    scan_shard,
)
from data_pipeline.prepare.parallel import Workers, open_workers
from data_pipeline.serve.order.window_stream import WindowCache
from data_pipeline.serve.order.windows import Windows
from data_pipeline.serve.reader import Corpus

_BLOCKS = (64, 128, 256, 512, 1024)  # block sizes for which the padding of isolated documents is reported
_BAR = 40  # characters of the longest bar
_LICENCES = 12  # most licences listed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("corpus", type=corpus_directory, help="directory of a prepared corpus")
    parser.add_argument("--png", metavar="PATH", type=picture, help="draw a histogram of lengths: png, pdf or svg")
    parser.add_argument("--quick", action="store_true", help="do not read the tokens: no duplicates, no overlap")
    parser.add_argument(
        "--length",
        metavar="L",
        type=at_least(1),
        help="count training documents that sequences of L tokens cut although they would fit into one",
    )
    parser.add_argument("--workers", metavar="N", type=at_least(1), help="processes (default: one for each CPU)")


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    """Measure and report."""
    manifest = Manifest.read(args.corpus)
    console = Console()
    report: dict[str, Any] = {"corpus": str(args.corpus), **summary(manifest), "licences": manifest.licences}
    report["left_out"] = manifest.provenance["left_out"]
    report["duplicates_removed"] = manifest.provenance["duplicates"]
    lengths = {split: document_lengths(args.corpus, shards) for split, shards in manifest.splits.items() if shards}
    for split, values in lengths.items():
        report["splits"][split]["document_tokens"] = _quantiles(values)
    everything = np.concatenate(list(lengths.values()))
    report["padding_isolated"] = {
        str(block): round(1 - int(everything.sum()) / int(extents(everything, block).sum()), 4) for block in _BLOCKS
    }
    edges, counts = length_histogram(everything)
    report["length_histogram"] = {"edges_tokens": edges.tolist(), "documents": counts.tolist()}
    if args.length:
        report["cut_by_sequences"] = {"length": args.length, **cut_by_packing(args.corpus, args.length)}
    if not args.quick:
        try:
            with open_workers(args.workers) as workers:
                if workers is None:
                    return None
                report |= _scan(args.corpus, manifest, workers, console)
        except KeyboardInterrupt:
            say("stopped: duplicates and overlap are left out, because counting did not finish", console)
            report |= {"passed": False, "exit_status": INTERRUPTED}
    _print(console, report)
    if args.png:
        write_afterwards(args, lambda: _draw(args.png, args.corpus.name, lengths))
    return report


def _scan(corpus: Path, manifest: Manifest, workers: Workers, console: Console) -> dict[str, Any]:
    """Read the tokens; return the duplicates that are left, and how much of the other splits is in train."""
    outside = held_out(manifest)
    wanted = {split: sample_runs(corpus, manifest.splits[split]) for split in outside}
    union = np.unique(np.concatenate([*wanted.values(), np.empty(0, np.uint64)]))
    found, documents = [np.empty(0, np.uint64)], []
    shards = [(split, shard) for split, shards in manifest.splits.items() for shard in shards]
    tasks = [ScanTask(corpus / s.file, union if split == "train" else union[:0]) for split, s in shards]
    with stages(console) as told:
        for done, scan in enumerate(workers.run(scan_shard, tasks), start=1):
            found.append(scan.found)
            documents.append(scan.documents)
            told("scan", done, len(tasks))
    hits = np.unique(np.concatenate(found))
    hashes = np.concatenate(documents)
    overlaps = {
        split: overlap(corpus, manifest.splits[split], wanted[split], np.intersect1d(wanted[split], hits))._asdict()
        for split in outside
    }
    return {
        "duplicates_left": len(hashes) - len(np.unique(hashes)),
        "overlap_with_train": {"run_tokens": NGRAM, **overlaps},
    }


def cut_by_packing(corpus: Path, length: int) -> dict[str, Any]:
    """Return, for each packing, how many documents of train are cut although they would fit into a sequence.

    It counts one pass. `documents` is the number of documents that fit into a sequence of `length`.
    """
    opened = Corpus.open(str(corpus.absolute()))  # absolute: a path, whatever its name begins with
    windows = Windows(opened.shard_sizes(None), (0, 0, 0))
    counts: dict[str, Any] = {}
    for packing, fit in (("stream", None), ("best_fit", lambda _, begin: (length, length - begin % length))):
        cache = WindowCache(opened, None, fit)
        found = [cache.get(0, windows, each, 1).cut(length, windows.room(each, length)) for each in range(len(windows))]
        counts["documents"], counts[packing] = (sum(column) for column in zip(*found, strict=True))
    return counts


def _quantiles(lengths: np.ndarray) -> dict[str, float]:
    points = {"min": 0, "p10": 10, "median": 50, "p90": 90, "max": 100}
    return {"mean": round(float(lengths.mean()), 1)} | {n: float(np.percentile(lengths, q)) for n, q in points.items()}


def _print(console: Console, report: dict[str, Any]) -> None:
    print_table(split_table(report["splits"]))
    quantiles = ("mean", "p10", "median", "p90", "max")
    rows = [
        [split, *(f"{lengths[q]:,.0f}" for q in quantiles)]
        for split, n in report["splits"].items()
        if (lengths := n.get("document_tokens"))
    ]
    print_table(Sheet(("tokens per document", *quantiles), rows))
    _print_lengths(console, report)
    _print_left_out(console, report)
    _print_overlap(console, report)


def _print_lengths(console: Console, report: dict[str, Any]) -> None:
    """Print the histogram of lengths, and what lengths cost: padding at the block, documents cut by sequences."""
    histogram = report["length_histogram"]
    say("documents by length in tokens:", console)
    most = max(histogram["documents"])
    for edge, count in zip(histogram["edges_tokens"], histogram["documents"], strict=False):
        bar = "█" * round(_BAR * count / most) or ("▏" if count else "")
        say(f"  ≥ {edge:>11,}  {count:>9,}  {bar}", console)
    shares = ", ".join(f"{share:.1%} of {block}" for block, share in report["padding_isolated"].items())
    say(f"padding of isolated documents, by the block (masked ones have none): {shares}", console)
    if counts := report.get("cut_by_sequences"):
        shares = ", ".join(
            f"{counts[packing]:,} ({counts[packing] / max(counts['documents'], 1):.1%}) with packing {packing}"
            for packing in ("stream", "best_fit")
        )
        say(
            f"of {counts['documents']:,} documents of at most {counts['length']:,} tokens in train, sequences cut "
            f"{shares}; joined, and nothing is padded in both",
            console,
        )


def _print_left_out(console: Console, report: dict[str, Any]) -> None:
    """Print the duplicates, the documents left out and the licences."""
    removed = report["duplicates_removed"]
    left = f", {report['duplicates_left']} left" if "duplicates_left" in report else ""
    say(f"duplicates: {removed['exact']} exact and {removed['near']} near ones removed{left}", console)
    left_out = ", ".join(f"{count} {reason}" for reason, count in report["left_out"].items())
    say(f"left out: {left_out or 'nothing'}", console)
    say(f"licences: {most_frequent(report['licences'], _LICENCES)}", console)


def _print_overlap(console: Console, report: dict[str, Any]) -> None:
    """Print how much of the other splits is in train too."""
    for split, n in report.get("overlap_with_train", {}).items():
        if split != "run_tokens":
            share = n["found"] / max(n["runs"], 1)
            say(
                f"overlap: {share:.2%} of {n['runs']:,} runs of {NGRAM} tokens from {split} are in train too; "
                f"{n['mostly_found']} of {n['documents']} documents are mostly in train",
                console,
            )


def most_frequent(counts: dict[str, int], number: int) -> str:
    """Return the names with the highest counts, with these, and how many others there are."""
    ordered = sorted(counts.items(), key=lambda each: -each[1])
    listed, rest = ordered[:number], ordered[number:]
    others = [f"{len(rest)} others ({sum(count for _, count in rest)})"] if rest else []
    return ", ".join([*(f"{name} ({count})" for name, count in listed), *others])


def _draw(path: Path, name: str, lengths: dict[str, np.ndarray]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    edges, _ = length_histogram(np.concatenate(list(lengths.values())))
    axes.hist(list(lengths.values()), bins=edges, stacked=True, label=list(lengths))
    axes.set_xscale("log", base=2)
    axes.set(xlabel="tokens in a document", ylabel="documents", title=name)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    say(f"histogram of lengths: {path}")
