"""`bst`: every command is a module with `add_arguments(parser)` and `run(args)`; this file only finds and runs it.

`run` prints for people and returns a report for machines (a dict, units in the key names) or None. With
``--json PATH`` the report is written there together with the versions it ran on. A report whose ``passed`` is false
makes the exit status 1, or its ``exit_status``; a user's error is one message and status 2.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

from bst_dist.version import versions
from data_pipeline.errors import UserError

# Command -> (module that holds it, one line of help). Modules are imported only when their command runs.
COMMANDS: dict[str, tuple[str, str]] = {
    "data prepare": ("data_pipeline.commands.prepare", "prepare a corpus: text to tokens in shards"),
    "data sources": ("data_pipeline.commands.sources", "list the sources of text and their settings"),
    "data stats": ("data_pipeline.commands.stats", "documents, tokens, lengths, duplicates, overlap of splits"),
    "data show": ("data_pipeline.commands.show", "print a document back from its tokens"),
    "data verify": ("data_pipeline.commands.verify", "check every hash and CRC of a corpus"),
    "recipe": ("bst_dist.cluster.describe", "every setting of a recipe: type, default, meaning"),
    "train": ("bst_dist.cluster.local", "train a recipe on this machine's ranks"),
    "launch": ("bst_dist.cluster.launch", "train a recipe on many hosts: preflight, start, watch, restart"),
    "ckpt ls": ("bst_dist.train.commands.ls", "list a run's checkpoints: worth, size, state, why each is kept"),
    "ckpt show": ("bst_dist.train.commands.show", "print what a checkpoint's manifest says"),
    "ckpt verify": ("bst_dist.train.commands.verify", "read every file and compare it with its digest"),
    "ckpt pin": ("bst_dist.train.commands.pin", "keep a checkpoint for good, or no longer"),
    "ckpt gc": ("bst_dist.train.commands.gc", "remove what a run's settings do not keep; says what, first"),
    "ckpt convert": ("bst_dist.train.commands.convert", "write weights as safetensors for other programs"),
    "eval": ("bst_dist.evaluate.perplexity", "loss, perplexity and bits per byte of a run, with standard errors"),
    "generate": ("bst_dist.evaluate.generate", "write text with a run's model"),
    "plot": ("bst_dist.evaluate.plot", "draw the training curves of runs"),
    "compare": ("bst_dist.evaluate.compare", "check that two runs are equal, step by step and weight by weight"),
    "baselines": ("bst_dist.evaluate.baselines", "what an order-2 byte model and xz -9 make of a corpus"),
    "demo": ("bst_dist.evaluate.demo", "the whole way in minutes, from text to a trained and evaluated model"),
    "verify": ("bst_dist.verify.command", "check that a recipe's gradients are one process's, however spread"),
    "models": ("bst_dist.plan.models", "list every model at a recipe's sizes: parameters, FLOPs, carried state"),
    "plan": ("bst_dist.plan.command", "memory, traffic, time and the best layout on a cluster, before a launch"),
    "bench data": ("data_pipeline.commands.bench", "read tokens beside webdataset, litdata and mosaicml-streaming"),
    "bench layers": ("bst_dist.bench.layers", "time a layer of every model beside other people's"),
    "bench checkpointing": ("bst_dist.bench.checkpointing", "what each policy keeps between the passes, and costs"),
    "bench parallel": ("bst_dist.plan.bench_parallel", "sequence parallelism against all-to-alls: bytes and time"),
    "bench plan": ("bst_dist.plan.measure", "plans against measured memory and traffic"),
    "bench saving": ("bst_dist.bench.saving", "what a checkpoint costs the training, beside plain DeepSpeed"),
    "sweep design": (
        "bst_dist.sweep.commands.design",
        "what a sweep would run and could see; refuses confounded grids",
    ),
    "sweep coordinates": (
        "bst_dist.sweep.commands.coordinates",
        "does a learning rate hold for every width and depth?",
    ),
    "sweep plan": ("bst_dist.sweep.commands.plan", "price a sweep and fit it into its budget"),
    "sweep run": ("bst_dist.sweep.commands.run", "train a sweep's runs; goes on after any stop"),
    "sweep status": ("bst_dist.sweep.commands.status", "where a sweep's runs stand"),
    "sweep collect": ("bst_dist.sweep.commands.collect", "gather a sweep's results into one table"),
    "sweep fit": ("bst_dist.sweep.commands.fit", "fit scaling laws to a sweep's table"),
    "sweep compare": ("bst_dist.sweep.commands.compare", "does the advantage grow or shrink with depth and compute?"),
    "sweep report": ("bst_dist.sweep.commands.report", "write a sweep's report, with its figures"),
}
GROUPS = {
    "data": "prepare and inspect corpora",
    "ckpt": "look after the checkpoints of a run",
    "bench": "measure side by side with peers",
    "sweep": "design, run and judge scaling sweeps",
}


def main(argv: list[str] | None = None) -> int:
    """Entry point of the console script; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    name, rest = _command(argv)
    if name is None:
        return 0 if not rest or rest[0] in ("-h", "--help") else 2
    module = importlib.import_module(COMMANDS[name][0])
    parser = argparse.ArgumentParser(prog=f"bst {name}", description=module.__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--json", metavar="PATH", type=Path, help="also write what is reported to PATH, as JSON")
    module.add_arguments(parser)
    args = parser.parse_intermixed_args(rest)  # overrides may stand anywhere
    try:
        report = module.run(args)
    except UserError as error:
        print(f"bst {name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    if args.json and report is not None:
        write_report(args.json, name, report)
    return int(report.get("exit_status", 1)) if report is not None and report.get("passed") is False else 0


def write_report(path: Path, command: str, report: dict[str, Any]) -> None:
    """Write a command's report with the versions it ran on; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps({"command": f"bst {command}", "versions": versions(), **report}, indent=2) + "\n")
    partial.replace(path)


def _command(argv: list[str]) -> tuple[str | None, list[str]]:
    """Split the command's one or two words from its arguments; prints help or an error when there is none."""
    for words in (2, 1):
        name = " ".join(argv[:words])
        if name in COMMANDS:
            return name, argv[words:]
    wanted = " ".join(argv[:2])
    if argv and argv[0] not in ("-h", "--help", *GROUPS):
        print(f"bst: no command {wanted!r}; the commands are below\n", file=sys.stderr)
    print("usage: bst COMMAND ...   (bst COMMAND --help tells more)\n")
    shown = {n: c for n, c in COMMANDS.items() if not argv or argv[0] not in GROUPS or n.startswith(argv[0] + " ")}
    width = max(map(len, shown))
    for name, (_, summary) in shown.items():
        print(f"  {name:<{width}}  {summary}")
    return None, argv[:1] if argv and argv[0] not in GROUPS else []
