"""Evaluate a run's model: on whole documents, at several lengths, or on tasks of the lm-evaluation-harness.

    bst eval runs/demo
    bst eval runs/demo --lengths 512,4096,16384 --plot lengths.png
    bst eval runs/demo --needle 1024,4096
    bst eval runs/demo --harness lambada_openai --limit 100

Without options, every document of the split is read from its beginning with carried state, so each token is predicted
from everything before it in its document, however long (--context L makes the model forget after every L tokens). The
end of a document is predicted and counted too. Errors are standard errors over documents, by the delta method for a
ratio of sums. Perplexity depends on the tokenizer; bits per byte of text does not.

--lengths L,L measures the same text in sequences of each length, and of the trained one: joined as in training, or, if
the model was trained on isolated or masked documents, on the documents that are that long.

--needle hides a pass key in validation text and asks for it at the end. Results are by length of the text and by
position of the key; --rows sets the number of texts. --needle L,L: texts of these lengths (default: the trained one).

A run that learns a synthetic task (data.synthetic) is evaluated on unseen rows: accuracy and loss by distance of the
answer, with the best possible loss; errors are over rows. --length L takes rows of another length.

Several processes can share the documents: --ranks N on this machine, or `torchrun --no-python bst eval RUN`. Documents
are read longest first; Ctrl-C stops and reports those that are finished.

The report is saved in the run's reports/, where `bst compare` and `bst export` find it; --json PATH also writes it to
PATH.

--harness TASK,TASK runs tasks of EleutherAI's lm-evaluation-harness, an optional package: pip install
'bst-dist[harness]'.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from bst_base.arguments import at_least, picture
from bst_base.errors import StorageError, UserError
from bst_dist.report.saved import REPORTS, write_report
from bst_dist.study.evaluation import needle, perplexity, synthetic
from bst_dist.study.evaluation.scoring import TOKENS_AT_ONCE
from bst_dist.study.harness.command import run as run_harness
from bst_dist.train.rundir import read_recipe
from data_pipeline.synthetic.config import SyntheticConfig

DOCUMENTS, LENGTHS, HARNESS, SYNTHETIC, NEEDLE = (
    "whole documents",
    "--lengths",
    "--harness",
    "synthetic tasks",
    "--needle",
)
OPTIONS = {
    "context": (DOCUMENTS,),
    "corpus": (DOCUMENTS, LENGTHS, NEEDLE),
    "tokens": (LENGTHS,),
    "plot": (LENGTHS,),
    "harness_tasks": (HARNESS,),
    "limit": (HARNESS,),
    "fewshot": (HARNESS,),
    "rows": (SYNTHETIC, NEEDLE),
    "length": (SYNTHETIC,),
    "batch_size": (DOCUMENTS, LENGTHS),
    "ranks": (DOCUMENTS,),
}
"""Option -> the evaluations that it applies to."""
FILES = {DOCUMENTS: "documents", LENGTHS: "lengths", HARNESS: "harness", SYNTHETIC: "synthetic", NEEDLE: "needle"}
"""Evaluation -> its part of the report's file name in the run directory."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", type=Path, help="directory of a run")
    parser.add_argument("--split", default="validation", help="the documents to read (default: %(default)s)")
    parser.add_argument(
        "--corpus", metavar="CORPUS", help="another prepared corpus of the same tokenizer (default: its recipe's)"
    )
    parser.add_argument(
        "--checkpoint",
        metavar="STEP",
        type=int,
        help="weights after this step (default: those of the newest valid checkpoint)",
    )
    parser.add_argument("--averaged", action="store_true", help="evaluate the averaged weights (train.average)")
    parser.add_argument(
        "--context",
        metavar="L",
        type=int,
        help="reset the model's state after every L tokens (default: only at the beginning of a document)",
    )
    parser.add_argument(
        "--precision", choices=["fp32", "bf16"], help="precision of matrix products (default: as trained)"
    )
    parser.add_argument(
        "--batch-size",
        metavar="N",
        type=int,
        help=f"at most N documents or sequences per forward pass (default: as many as make {TOKENS_AT_ONCE:,} tokens)",
    )
    parser.add_argument(
        "--ranks",
        metavar="N",
        type=at_least(1),
        help="processes on this machine that share the documents, each with its own device (default: 1)",
    )
    lengths = parser.add_argument_group("length generalisation")
    lengths.add_argument("--lengths", metavar="L,L", type=_lengths, help="lengths in tokens, multiples of the block")
    lengths.add_argument("--tokens", metavar="N", type=int, help="read at most N tokens (default: the whole split)")
    lengths.add_argument(
        "--plot", metavar="PATH", type=picture, help="draw the loss by position and by length: png, pdf or svg"
    )
    keys = parser.add_argument_group("pass keys in text")
    keys.add_argument(
        "--needle",
        metavar="L,L",
        type=_lengths,
        nargs="?",
        const=[],
        help="lengths of the texts in tokens (default: the trained one)",
    )
    tasks = parser.add_argument_group("runs that learn a synthetic task")
    tasks.add_argument(
        "--rows",
        metavar="N",
        type=at_least(1),
        help=f"rows to read (default: {synthetic.ROWS}; with --needle: {needle.ROWS} per line of the table)",
    )
    tasks.add_argument(
        "--length", metavar="L", type=at_least(1), help="tokens per row, a multiple of the block (default: as trained)"
    )
    harness = parser.add_argument_group("lm-evaluation-harness")
    harness.add_argument("--harness", metavar="TASK,TASK", type=lambda names: names.split(","), help="tasks by name")
    harness.add_argument("--harness-tasks", metavar="DIR", type=Path, help="your own tasks: YAML files in DIR")
    harness.add_argument("--limit", metavar="N", type=at_least(1), help="only the first N examples of each task")
    harness.add_argument(
        "--fewshot", metavar="N", type=at_least(0), help="few-shot examples (default: as the task says)"
    )


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    form = _form(args)
    report = _evaluate(args, form)
    if report is None or args.ranks:  # of several processes, the first one saves it
        return report
    path = args.run / REPORTS / _file_name(args, form, report)
    try:
        write_report(path, "eval", report)
    except (OSError, StorageError) as error:  # a full disk is a StorageError
        why = StorageError.of(error, path, doing="write") if isinstance(error, OSError) else error
        print(f"bst eval: the report was not kept in the run; --json writes it elsewhere: {why}")
    return report


def _file_name(args: argparse.Namespace, form: str, report: dict[str, Any]) -> str:
    """Return the file name of the report, which contains the options.

    A repeated evaluation replaces its report. Another evaluation, or one that was stopped, has another name.
    """
    asked = [
        args.split,
        FILES[form],
        args.corpus and Path(args.corpus).name,
        args.context and f"context-{args.context}",
        args.precision,
        "averaged" if args.averaged else None,
        "part" if report.get("passed") is False else None,
    ]
    return "-".join(["eval", str(report["step"]), *filter(None, asked)]) + ".json"


def _evaluate(args: argparse.Namespace, form: str) -> dict[str, Any] | None:
    if form != DOCUMENTS and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']}: {form} runs in one process only (several can share only "
            f"{DOCUMENTS}): start one process"
        )
    if form == LENGTHS:
        from bst_dist.study.lengths import command as lengths  # imports matplotlib

        return lengths.run(args)
    if form == HARNESS:
        return run_harness(args)
    if form == SYNTHETIC:
        return synthetic.run(args)
    if form == NEEDLE:
        return needle.run(args)
    return perplexity.run(args)


def _form(args: argparse.Namespace) -> str:
    """Return the requested evaluation; raises UserError for two evaluations, or an option that does not apply."""
    asked = {LENGTHS: args.lengths, HARNESS: args.harness, NEEDLE: args.needle is not None}
    forms = [form for form, given in asked.items() if given] or [DOCUMENTS]
    if len(forms) > 1:
        raise UserError(f"{' and '.join(forms)} are separate evaluations: run one at a time")
    form = forms[0]
    if form == DOCUMENTS and isinstance(read_recipe(args.run).data, SyntheticConfig):
        form = SYNTHETIC
    for option, owners in OPTIONS.items():
        if getattr(args, option) is not None and form not in owners:
            raise UserError(
                f"--{option.replace('_', '-')} does not apply to this evaluation, only to {' and '.join(owners)}"
            )
    return form


def _lengths(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of lengths like 512,4096") from None
