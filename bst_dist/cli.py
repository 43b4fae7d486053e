"""The program `bst`: finds the module of a command, parses its arguments and runs it.

Every command is a module with `add_arguments(parser)` and `run(args)`. `run` prints text for people and returns a
report for machines (a dict, units in the key names) or None. With ``--json PATH`` the report is also written to PATH,
together with the versions of the software; figures and other files that are made from the numbers are written after it
(`bst_base.outputs`), so that no number is lost because of them. If the report's ``passed`` is false, the exit status is
its ``exit_status``, by default 1. A UserError is printed as one message; its exit status is 2 by default.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from bst_base.arguments import output
from bst_base.errors import StorageError, UserError
from bst_base.files import FULL
from bst_base.importing import uncollected
from bst_base.outputs import left_for_afterwards
from bst_base.stopping import INTERRUPTED
from bst_dist.extras import install_hint
from bst_dist.faults.output import IgnoreWriteErrors
from bst_dist.report.saved import write_report
from bst_dist.usage import Command, HelpFormatter, listing, nearest_command, overview, refuse_alone
from bst_dist.version import versions

# Section of the help -> command -> (its module, one line of help), in the order of typical use.
# Modules are imported only when their command runs.
SECTIONS: dict[str, dict[str, Command]] = {
    "Begin": {
        "doctor": (
            "bst_dist.tools.doctor.command",
            "check this machine: what training needs, what is missing, how to get it",
        ),
        "demo": ("bst_dist.tools.demo", "from text to a trained and evaluated model, in minutes"),
    },
    "Data": {
        "data sources": ("data_pipeline.commands.sources", "list the sources of text and their settings"),
        "data prepare": ("data_pipeline.commands.prepare", "prepare a corpus: text to tokens in shards"),
        "data stats": ("data_pipeline.commands.stats", "documents, tokens, lengths, duplicates, overlap of splits"),
        "data show": ("data_pipeline.commands.show", "list or find documents, print one decoded from its tokens"),
        "data verify": ("data_pipeline.commands.verify", "check every hash and CRC of a corpus"),
        "data pack": (
            "data_pipeline.commands.pack",
            "add packed files to an older corpus: faster reads of short documents",
        ),
        "data push": ("data_pipeline.commands.push", "upload a corpus to an object store"),
        "data export": ("data_pipeline.commands.export", "write a corpus for Megatron-LM, or as Parquet"),
    },
    "Before a run": {
        "recipe": ("bst_dist.describe", "every setting of a recipe: type, default, meaning"),
        "models": ("bst_dist.plan.models", "every model at a recipe's sizes: parameters, FLOPs, carried state"),
        "plan": ("bst_dist.plan.command", "memory, traffic, time and the best layout on a cluster, before a launch"),
        "verify": ("bst_dist.verify.command", "check that gradients are the same for every parallel layout"),
    },
    "Train": {
        "train": ("bst_dist.cluster.local", "train a recipe on this machine's ranks"),
        "launch": ("bst_dist.cluster.launch", "train a recipe on many hosts: preflight, start, watch, restart"),
        "ckpt ls": (
            "bst_dist.checkpoint.commands.ls",
            "list a run's checkpoints: loss, size, state, why each is kept",
        ),
        "ckpt show": ("bst_dist.checkpoint.commands.show", "print what a checkpoint's manifest says"),
        "ckpt verify": ("bst_dist.checkpoint.commands.verify", "read every file and compare it with its digest"),
        "ckpt pin": ("bst_dist.checkpoint.commands.pin", "keep a checkpoint for good, or undo that"),
        "ckpt gc": ("bst_dist.checkpoint.commands.gc", "remove checkpoints that a run's settings do not keep"),
        "ckpt convert": ("bst_dist.checkpoint.commands.convert", "write weights as safetensors for other programs"),
        "ckpt push": ("bst_dist.checkpoint.commands.push", "copy a run and its newest checkpoint to an object store"),
        "ckpt pull": ("bst_dist.checkpoint.commands.pull", "download such a copy"),
    },
    "Look at runs": {
        "plot": ("bst_dist.study.comparison.curves", "draw the training curves of runs"),
        "compare": (
            "bst_dist.study.comparison.command",
            "compare runs: recipes, losses on the same text, speed; --equal: are two equal to the last bit?",
        ),
    },
    "Evaluate": {
        "eval": (
            "bst_dist.study.evaluation.command",
            "loss, perplexity, bits per byte, of documents or by length; tasks",
        ),
        "ablate": (
            "bst_dist.study.ablation.command",
            "what each part of a model contributes: the loss without it",
        ),
        "baselines": ("bst_dist.study.evaluation.baselines", "bits per byte of an order-2 byte model and of xz -9"),
        "generate": ("bst_dist.study.evaluation.generate", "write text with a run's model"),
    },
    "Study": {
        "experiment settings": (
            "bst_dist.study.experiment.commands.settings",
            "every setting of an experiment's file: type, default, meaning",
        ),
        "experiment run": (
            "bst_dist.study.experiment.commands.run",
            "train, evaluate and compare the arms of a small experiment; can be resumed",
        ),
        "experiment status": ("bst_dist.study.experiment.commands.status", "progress of an experiment's runs"),
        "experiment report": (
            "bst_dist.study.experiment.commands.report",
            "an experiment's table and figure, from its runs",
        ),
        "law fit": ("bst_dist.study.law_fit", "fit scaling laws to a table of your own: N, D, loss, width, depth"),
        "sweep settings": (
            "bst_dist.study.sweep.commands.settings",
            "every setting of a sweep's file: type, default, meaning",
        ),
        "sweep design": (
            "bst_dist.study.sweep.commands.design",
            "runs and statistical power of a sweep; rejects confounded grids",
        ),
        "sweep coordinates": (
            "bst_dist.study.sweep.commands.coordinates",
            "does a learning rate hold for every width and depth?",
        ),
        "sweep plan": ("bst_dist.study.sweep.commands.plan", "price a sweep and fit it into its budget"),
        "sweep pack": (
            "bst_dist.study.sweep.commands.pack",
            "pack a sweep into one folder, for a machine without network",
        ),
        "sweep run": ("bst_dist.study.sweep.commands.run", "train a sweep's runs; can be resumed"),
        "sweep status": ("bst_dist.study.sweep.commands.status", "progress of a sweep's runs"),
        "sweep collect": ("bst_dist.study.sweep.commands.collect", "gather a sweep's results into one table"),
        "sweep fit": ("bst_dist.study.sweep.commands.fit", "fit scaling laws to a sweep's table"),
        "sweep compare": (
            "bst_dist.study.sweep.commands.compare",
            "does the advantage grow or shrink with depth and compute?",
        ),
        "sweep report": ("bst_dist.study.sweep.commands.report", "write a sweep's report, with its figures"),
    },
    "Long Range Arena": {
        "lra prepare": ("bst_dist.study.lra.commands.prepare", "generate a task's examples, or read published ones"),
        "lra eval": ("bst_dist.study.lra.commands.eval", "a run's accuracy on the test split, with its uncertainty"),
        "lra table": ("bst_dist.study.lra.commands.table", "runs of one task side by side, and means over seeds"),
    },
    "Share": {
        "export": ("bst_dist.hub.export", "write a run as a Hugging Face model, with its tokenizer and a model card"),
        "import": ("bst_dist.hub.importing", "make a run directory from an exported model, to evaluate or fine-tune"),
    },
    "Measure": {
        "bench data": ("data_pipeline.commands.bench", "compare reading speed with that of other packages"),
        "bench gpu": ("bst_dist.tools.bench.gpu", "measure every claim about one GPU, in nine minutes"),
        "bench index": (
            "data_pipeline.commands.bench_index",
            "memory and start time by the size of a corpus",
        ),
        "bench layers": ("bst_dist.tools.bench.layers", "time a layer of every model and of other packages"),
        "bench checkpointing": (
            "bst_dist.tools.bench.checkpointing",
            "memory and time of each activation checkpointing policy",
        ),
        "bench parallel": ("bst_dist.tools.bench.parallel", "sequence parallelism against all-to-alls: bytes and time"),
        "bench plan": ("bst_dist.tools.bench.plan", "compare plans with measured memory and traffic"),
        "bench recovery": (
            "bst_dist.tools.bench.recovery",
            "time from a killed rank to the next step, by phase; goodput",
        ),
        "bench scale": (
            "bst_dist.tools.bench.scale",
            "count what each of thousands of ranks opens, reads and computes",
        ),
        "bench slices": ("bst_dist.tools.bench.slices", "one long sequence slice by slice: time and memory"),
        "bench saving": ("bst_dist.tools.bench.saving", "what a checkpoint costs, compared with DeepSpeed's own"),
    },
}
COMMANDS: dict[str, Command] = {name: command for section in SECTIONS.values() for name, command in section.items()}
EXPECTED = (UserError, OSError, ModuleNotFoundError)
"""Errors that end a command with a message: what the user gave, a disk, an extra that is not installed."""
GROUPS = {
    "data": "prepare and inspect corpora",
    "ckpt": "manage the checkpoints of a run",
    "experiment": "small controlled comparisons: one file, one table",
    "law": "fit scaling laws to any table",
    "sweep": "design, run and judge scaling sweeps",
    "lra": "classification tasks with long sequences",
    "bench": "benchmarks, with other packages for comparison",
}


def main(argv: list[str] | None = None) -> int:
    """Run the console script and return its exit status.

    An error of standard output does not end the command, so that its files are still written; it is told at the end.
    """
    argv = sys.argv[1:] if argv is None else argv
    if sys.stdout is None:  # closed by the shell
        return _status(argv)
    said = IgnoreWriteErrors(sys.stdout)
    try:
        with contextlib.redirect_stdout(said):
            status = _status(argv)
    except SystemExit:  # raised by argparse after a help
        said.flush()
        if said.error is None:
            raise
    said.flush()
    if said.error is None:
        return status
    os.dup2(os.open(os.devnull, os.O_WRONLY), said.fileno())  # buffered output goes there at exit
    if isinstance(said.error, BrokenPipeError):  # the reader has closed the pipe, like `head`
        return 128 + signal.SIGPIPE
    print(f"bst: cannot write to the standard output: {said.error.strerror}", file=sys.stderr)
    return StorageError.exit_status


def _status(argv: list[str]) -> int:
    """Run a command and return the exit status."""
    name = _command_of(argv)
    if name is None:
        return _without_command(argv)
    try:
        with uncollected():
            module = importlib.import_module(COMMANDS[name][0])  # may need an extra that is not installed
        parser = parser_of(name)
        args = parser.parse_intermixed_args(argv[len(name.split()) :])  # overrides may be anywhere
        refuse_alone(parser, args)
    except EXPECTED as error:
        return _told(name, error)
    except KeyboardInterrupt:
        return INTERRUPTED
    return _run(module.run, name, args)


def _command_of(argv: list[str]) -> str | None:
    """Return the command that the first two words name, or the first word alone; None if there is no such command."""
    for name in (" ".join(argv[:2]), *argv[:1]):
        if name in COMMANDS:
            return name
    return None


def _run(command: Callable[[argparse.Namespace], dict[str, Any] | None], name: str, args: argparse.Namespace) -> int:
    """Run a command and write its files, if it fails those of the part that it has finished; return the status."""
    try:
        report = command(args)
    except EXPECTED as error:
        status = _told(name, error)
        _write_outputs(args, name, None)
        return status
    except KeyboardInterrupt:
        _write_outputs(args, name, None)
        return INTERRUPTED
    unwritten = _write_outputs(args, name, report)
    if report is not None and report.get("passed") is False:
        return int(report.get("exit_status", 1))
    return unwritten


def _write_outputs(args: argparse.Namespace, name: str, report: dict[str, Any] | None) -> int:
    """Write the report, then the files that are made from it; one of EXPECTED does not keep the others from it.

    Return 0, or the exit status of the last that could not be written.
    """
    status = 0
    writes = list(left_for_afterwards(args))
    if args.json and report is not None:
        writes.insert(0, lambda: write_report(args.json, name, report))
    for write in writes:
        try:
            write()
        except EXPECTED as error:
            status = _told(name, error)
    return status


def _told(name: str, error: Exception) -> int:
    """Print one of the EXPECTED errors as a message and return the exit status; raise it again if it is a fault."""
    if isinstance(error, ModuleNotFoundError) and (how := install_hint(error.name or "")) is not None:
        error = UserError(how)
    elif isinstance(error, OSError) and (error.filename is not None or error.errno in FULL):
        error = StorageError.of(error, doing="read or write")
    if not isinstance(error, UserError):  # such as an OSError of a socket or a process
        raise error
    print(f"bst {name}: {error}", file=sys.stderr)
    return error.exit_status


def parser_of(name: str) -> argparse.ArgumentParser:
    """Return the parser of a command's arguments; imports the command's module."""
    module = importlib.import_module(COMMANDS[name][0])
    parser = argparse.ArgumentParser(prog=f"bst {name}", description=module.__doc__, formatter_class=HelpFormatter)
    module.add_arguments(parser)
    parser.add_argument("--json", metavar="PATH", type=output, help="also write what is reported to PATH, as JSON")
    return parser


def _without_command(argv: list[str]) -> int:
    """Print the help, a group's commands, the versions, or an error for an unknown command; return the exit status."""
    if not argv or argv[0] in ("-h", "--help"):
        print(overview(SECTIONS, GROUPS))
        return 0
    if argv[0] == "--version":
        print("\n".join(f"{name:<14} {version}" for name, version in versions().items()))
        return 0
    if argv[0] in GROUPS and (len(argv) == 1 or argv[1] in ("-h", "--help")):
        print(listing(COMMANDS, argv[0], GROUPS[argv[0]]))
        return 0
    typed = " ".join(argv[: 2 if argv[0] in GROUPS else 1])
    meant = nearest_command(argv, COMMANDS, GROUPS)
    hint = f"did you mean `bst {meant}`?" if meant else "`bst` lists the commands"
    print(f"bst: no command {typed!r}: {hint}", file=sys.stderr)
    return 2
