"""What each part of a trained model contributes: the loss when the part is removed or changed.

    bst ablate runs/demo
    bst ablate runs/demo --interventions zero noise:0.1 delay:2 --layers 3 --documents 16

Every intervention is applied to each layer alone and to all layers together, and scored on the same document beginnings
as the unchanged model, streamed as in `bst eval`. The increase in loss is paired, so its standard error over documents
is far below that of either loss. It is also reported by position in the document and in the block. The figure --out
(default: ablations.png in the run's directory) shows all of it. Ctrl-C stops and reports the finished interventions.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from bst_base.arguments import at_least, picture
from bst_base.errors import UserError
from bst_base.outputs import require_writable
from bst_base.stopping import INTERRUPTED, deferred_interrupt
from bst_base.terminal import Sheet, print_table, say
from bst_dist.study.ablation.figure import draw
from bst_dist.study.ablation.interventions import KINDS, Intervention, defaults, obstacle, parse, same_as_zero
from bst_dist.study.ablation.measure import Ablation, Increase, Losses, Text, ablate, summary
from bst_dist.study.evaluation.corpora import open_text
from bst_dist.study.evaluation.trained import Trained, open_run
from bst_dist.study.report.style import save_afterwards
from data_pipeline.commands.progress import stages
from data_pipeline.serve.reader import Corpus

Plan = list[tuple[Intervention, tuple[int, ...]]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = "; ".join(f"{name}{':STRENGTH' if kind.strengths else ''} ({kind.text})" for name, kind in KINDS.items())
    parser.add_argument("run", metavar="RUN", type=Path, help="directory of a run")
    parser.add_argument(
        "--interventions",
        metavar="KIND[:STRENGTH]",
        nargs="+",
        help=f"which to apply (default: all, at several strengths). {kinds}",
    )
    parser.add_argument(
        "--layers",
        metavar="LAYER",
        nargs="+",
        help="layer numbers from 0, or `all` for all at once (default: each alone, and all)",
    )
    parser.add_argument(
        "--documents",
        metavar="N",
        type=int,
        default=64,
        help="number of documents to read, evenly spread over the split (default: %(default)s)",
    )
    parser.add_argument(
        "--tokens",
        metavar="T",
        type=int,
        help="tokens to read from the beginning of each document (default: 8 x train.sequence_length)",
    )
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
    parser.add_argument(
        "--seed", type=at_least(0), default=0, help="seed of noise and shuffling (default: %(default)s)"
    )
    parser.add_argument("--out", metavar="PATH", type=picture, help="the figure to draw: .png, .pdf or .svg")


def run(args: argparse.Namespace) -> dict[str, Any]:
    out = args.out or args.run / "ablations.png"
    require_writable(out)
    for name in ("documents", "tokens"):
        if (given := getattr(args, name)) is not None and given < 1:
            raise UserError(f"--{name} {given}: read at least one")
    trained = open_run(args.run, args.checkpoint)
    planned, left_out = plan(trained, args.interventions, args.layers)
    report: dict[str, Any] = {
        "run": str(args.run),
        "step": trained.step,
        "split": args.split,
        "seed": args.seed,
        "left_out": left_out,
        "corpora": [],
    }
    opened = open_text(trained, args.split, args.corpus)
    with deferred_interrupt() as stop_requested:
        for number, corpus in enumerate(opened):
            path = out if len(opened) == 1 else out.with_stem(f"{out.stem}-{number}")
            figures = _ablate(args, trained, corpus, planned, stop_requested, path)
            report["corpora"].append({"corpus": corpus.storage.where, **figures})
            if (done := len(figures["interventions"])) < len(planned):
                say(f"stopped: {done} of {len(planned)} interventions are done")
                report |= {"passed": False, "exit_status": INTERRUPTED}
                break
    for line in left_out:
        say(f"left out: {line}")
    return report


def _ablate(
    args: argparse.Namespace, trained: Trained, corpus: Corpus, planned: Plan, stopped: Callable[[], bool], path: Path
) -> dict[str, Any]:
    """Measure and print the interventions on one corpus (after a stop, the finished ones); return the results.

    They are drawn after the report is written.
    """
    started = time.perf_counter()
    text = beginnings(trained, corpus, args.documents, args.tokens)
    untouched, increases = measure(trained, text, planned, args.seed, stopped)
    found = summary(untouched, increases, time.perf_counter() - started)
    _show(args, trained, corpus.storage.where, found)
    if not increases:
        return found.report()
    save_afterwards(args, lambda: draw(found, trained.recipe.train.sequence_length), path)
    return found.report() | {"figure": str(path)}


def plan(trained: Trained, asked: Sequence[str] | None, where: Sequence[str] | None) -> tuple[Plan, list[str]]:
    """Return every intervention with its layers, and sentences about the interventions that do not apply.

    Raises UserError for an unknown intervention or layer, and if no requested intervention applies.
    """
    layers = _layers(trained, where)
    mixers = trained.recipe.model.mixers()
    wanted = [one for text in asked for one in parse(text)] if asked else defaults()
    planned: Plan = []
    reasons: dict[tuple[str, str], list[int]] = {}
    for intervention in wanted:
        reached = []
        for index, layer in enumerate(trained.model.layers):
            reason = obstacle(layer.mixer, intervention.kind)
            if reason is None and not asked and intervention.kind == "no-cross" and same_as_zero(layer.mixer):
                reason = "the same as zero"
            if reason is None:
                reached.append(index)
            elif layers is None or layers & {"all", index}:
                reasons.setdefault((intervention.kind, f"{mixers[index]}: {reason}"), []).append(index)
        if len(reached) > 1 and (layers is None or "all" in layers):
            planned.append((intervention, tuple(reached)))
        planned += [(intervention, (index,)) for index in reached if layers is None or index in layers]
    left_out = _left_out(reasons)
    if not planned:
        raise UserError("none of the interventions applies to the layers asked for:\n  " + "\n  ".join(left_out))
    return planned, left_out


def _layers(trained: Trained, where: Sequence[str] | None) -> set[int | str] | None:
    depth = len(trained.model.layers)
    for text in where or ():
        if text != "all" and not (text.isdecimal() and int(text) < depth):
            raise UserError(f"--layers {text}: the model has {depth} layers, 0 to {depth - 1}; or all, for all at once")
    return {text if text == "all" else int(text) for text in where} if where else None


def _left_out(reasons: dict[tuple[str, str], list[int]]) -> list[str]:
    """Return one line for all interventions that do not apply to the same layers for the same reason."""
    grouped: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for (kind, reason), indices in reasons.items():
        kinds = grouped.setdefault((reason, tuple(dict.fromkeys(indices))), [])
        kinds += [kind] if kind not in kinds else []
    return [f"{', '.join(kinds)} in {_named(indices)} ({reason})" for (reason, indices), kinds in grouped.items()]


def _named(layers: Sequence[int]) -> str:
    return f"layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}"


def beginnings(trained: Trained, corpus: Corpus, documents: int, tokens: int | None) -> Text:
    """Return the text: the beginnings of `documents` documents, evenly spread over the split."""
    chosen = np.unique(np.linspace(0, len(corpus) - 1, min(documents, len(corpus))).round().astype(int))
    lengths = np.zeros(len(corpus), np.int64)
    lengths[chosen] = np.minimum(corpus.lengths[chosen], tokens or 8 * trained.recipe.train.sequence_length)
    text = Text(corpus, lengths, corpus.token_bytes(), trained.begin(corpus))
    if not text.tokens:
        raise UserError(f"{corpus.where}: the documents chosen have no token to predict: raise --documents or --tokens")
    return text


def measure(
    trained: Trained, text: Text, planned: Plan, seed: int, stopped: Callable[[], bool]
) -> tuple[Losses, list[Increase]]:
    """Score the text with the unchanged model and with every intervention, with a progress display."""
    recipe = trained.recipe
    with stages(Console()) as report:
        return ablate(
            trained.model,
            text,
            planned,
            slice_length=recipe.train.sequence_length,
            precision=recipe.train.precision,
            seed=seed,
            stopped=stopped,
            progress=lambda done: report("ablate", done, (1 + len(planned)) * text.tokens),
        )


def _show(args: argparse.Namespace, trained: Trained, where: str, found: Ablation) -> None:
    last, rows, before = found.document_edges[-2], [], ""
    bits = "" if found.bits_per_byte is None else f", {found.bits_per_byte.value:.4f} bits per byte"
    for one in found.increases:
        name = str(one.intervention)
        rows.append(
            [
                name if name != before else "",
                str(one.layers[0]) if len(one.layers) == 1 else "all",
                one.loss.text(4, sign=True),
                "" if one.bits_per_byte is None else one.bits_per_byte.text(4, sign=True),
                *(f"{one.in_document[place].value:+.4f}" for place in (0, -1)),
            ]
        )
        before = name
    print_table(
        Sheet(("", "layer", "nats per token", "bits per byte", "first block", f"from {last:,}"), rows),
        f"{args.run} after {trained.step:,} steps: {args.split} of {where}\nunchanged model: "
        f"{found.loss.value:.4f} nats per token{bits}\n"
        "increase of the loss with each intervention:",
        f"{found.documents:,} documents, {found.tokens:,} tokens, {found.time_s:.0f} s; ± standard "
        f"error over documents;\nlast two columns: increase in nats per token in a document's first block, and "
        f"from token {last:,} on",
    )
