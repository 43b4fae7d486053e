"""The output of a run: the header of a start, the writers of its metrics, and its outcome."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

from bst_base.sizes import counted
from bst_dist.config import Recipe
from bst_dist.model.attention.sliding import attention_path
from bst_dist.parallel.ranks import Ranks
from bst_dist.plan.hardware import SLOW_BF16, bf16_slowdown
from bst_dist.report.console import Console
from bst_dist.report.metrics import MetricsFile, Writer
from bst_dist.report.probes import Probes
from bst_dist.report.tensorboard import TensorBoard, hparams
from bst_dist.report.writers import Background, find
from bst_dist.train.context import Context
from bst_dist.train.engine import Engine
from bst_dist.train.evaluation import Evaluation
from bst_dist.train.start.request import Start
from data_pipeline.serve.config import DataConfig
from data_pipeline.serve.slices import slices_of


def header(start: Start, engine: Engine, ranks: Ranks, compiled: str, local: str = "", reading: str = "") -> str:
    """Return the text printed before the first step of a start.

    `compiled`: whether its layers are compiled, or why not. `local`: where its local copies are. `reading`: how much
    of the data the run will have read.
    """
    lines = {
        "run": f"{start.run_dir}",
        **_of_model(start, engine, ranks),
        **_of_data(start, reading),
        **_of_changes(start.recipe),
        **_of_slices(start),
        **_of_speed(start, engine, ranks, compiled),
        "copies": local,
        "change": f"{'; '.join(start.changed)} (before, from here on)" if start.changed else "",
    }
    unread = [f"model.{name}" for name in start.recipe.model.unread()]
    unread += [f"schedule.{name}" for name in start.recipe.schedule.unread()]
    if unread:
        lines["unused"] = f"set, but without effect in this recipe: {', '.join(unread)}"
    columns = Console.header(start.objective.labels, _has_peak(ranks))
    return "\n".join([*(f"{name:<6} {text}" for name, text in lines.items() if text), columns])


def _of_model(start: Start, engine: Engine, ranks: Ranks) -> dict[str, str]:
    """Return the lines on the model, and on what trains it."""
    recipe, model, world = start.recipe, start.recipe.model, ranks.world
    layers = ", ".join(f"{count} {mixer}" for mixer, count in Counter(model.mixers()).items())
    size = f"{_parameters(engine) / 1e6:,.2f} M parameters"
    mesh = f"dp {world // recipe.parallel.sp} x sp {recipe.parallel.sp}"
    tokens, count = recipe.train.sequences * recipe.train.sequence_length, start.spread.micro_batches
    lines = {
        "model": f"layers: {layers}; width {model.width}, block {model.block}: {size}",
        "ranks": f"{world} ({mesh}), ZeRO-{engine.stage}, {recipe.train.precision}, "
        f"activation checkpointing: {recipe.activation_checkpointing.describe()}, "
        f"attention: {attention_path(ranks.device)}" + (", deterministic" if recipe.deterministic else ""),
        "placed": f"rank 0 on {ranks.device}, threads: {ranks.threads}, cores {ranks.cores} of {socket.gethostname()}"
        + ("" if ranks.numa_node is None else f", bound to its device's NUMA node {ranks.numa_node}"),
        "step": f"{recipe.train.sequences} sequences of {recipe.train.sequence_length:,} = {tokens:,} tokens, "
        f"{counted(count, 'micro-batch', 'micro-batches')} per rank",
    }
    if recipe.optimizer.kind == "muon":
        lines["muon"] = f"for the {len(engine.module.hidden_matrices())} matrices inside the layers; AdamW for the rest"
    return lines


def _of_data(start: Start, reading: str) -> dict[str, str]:
    lines, data = {}, start.recipe.data
    if isinstance(data, DataConfig):
        lines["docs"] = f"{data.documents}, packing: {data.packing}"
    lines["data"] = reading
    if not start.objective.evaluates:
        lines["eval"] = "none: no corpus has a validation split (prepare one with validation_fraction above 0)"
    return lines


def _of_changes(recipe: Recipe) -> dict[str, str]:
    """Return the lines on changes of the batch and of the sequence length during the run."""
    lines, train = {}, recipe.train
    if train.sequence_changes:
        lines["batch"] = ", ".join(f"{count} sequences from step {step:,}" for step, count in train.batches.changes[1:])
    if train.length_changes:
        changes = [f"{length:,} tokens from step {step:,}" for step, length in train.lengths.changes[1:]]
        lines["length"] = f"{', '.join(changes)}; evaluated with {train.lengths.last:,}"
    return lines


def _of_slices(start: Start) -> dict[str, str]:
    """Return the lines on rows without tokens, and on sequences read in slices."""
    train = start.recipe.train
    lines = {"masked": start.spread.imbalance_message(start.recipe.parallel.sp)}
    if train.slice_tokens:
        every = f", one in {train.edges_every}" if train.edges_every > 1 else ""
        lines["slices"] = f"{train.slices:,} of {train.slice_tokens:,} tokens, edges: {train.edges}{every}"
    return lines


def _of_speed(start: Start, engine: Engine, ranks: Ranks, compiled: str) -> dict[str, str]:
    """Return the lines on what is compiled, or on a CPU that is slow in the recipe's precision."""
    if ranks.device.type != "cpu":
        loss = "yes" if engine.module.fused_loss else "no, compile: false"
        return {"layers": f"compiled: {compiled}", "loss": f"compiled: {loss}"}
    if start.recipe.train.precision == "bf16" and (slowdown := bf16_slowdown()) >= SLOW_BF16:
        return {
            "slow": f"this CPU multiplies matrices {slowdown:.0f} times as slowly in bf16 as in fp32; a new run is "
            "faster with train.precision=fp32"
        }
    return {}


def writers_of(start: Start, engine: Engine, ranks: Ranks, done: int) -> list[Writer]:
    """Open the writers of rank 0, for a run that continues after `done` steps."""
    log = start.recipe.log
    writers: list[Writer] = [MetricsFile(start.run_dir, done)]
    train = start.recipe.train
    writers.append(Console(log.every, train.steps, train.tokens_after, log.straggler, _has_peak(ranks)))
    about = {"parameters": _parameters(engine), "ranks": ranks.world}
    if log.tensorboard:
        writers.append(TensorBoard(start.run_dir, done, hparams(start.recipe, **about)))
    for name in log.writers:
        writers.append(Background(name, partial(_writer, name, start, about)))
    return writers


def _has_peak(ranks: Ranks) -> bool:
    """Whether the device has a known peak speed, so that MFU can be computed."""
    return ranks.device.type != "cpu"


def _writer(name: str, start: Start, about: dict[str, Any]) -> Writer:
    return find(name)(start.run_dir, start.recipe, about)


def probes_of(start: Start, context: Context, own: Evaluation | None, writers: Sequence[Writer]) -> Probes:
    """Return the measurements inside the model at evaluations.

    `own`: the evaluation on the run's own validation split; text samples continue its first sequence.
    """
    tokenizer = start.objective.tokenizer()
    prompt: list[int] = []
    if tokenizer is not None and own is not None:
        first = slices_of(own.batches[0])[0]
        ids, counts = first.input_ids[0], first.loss_mask[0]
        prompt = ids[: max(1, int(counts.cumprod().sum()))].tolist()  # stops at the first token without a label
    recipe, ranks = start.recipe, context.ranks
    evaluated = recipe.evaluation.every, recipe.train.steps
    return Probes(recipe.log, context.engine, ranks, writers, tokenizer, prompt, evaluated, ranks.print_first)


def outcome_of(lines: Sequence[dict[str, Any]], steps: int, evaluates: bool = True) -> dict[str, Any]:
    """Return the last step of a run of `steps` steps, its losses, and whether the run is finished.

    `lines`: the run's metrics. `evaluates`: whether the run has validation data; then it is finished only after the
    evaluation of its last step.
    """
    done = max((line["step"] for line in lines if line["kind"] in ("train", "skipped")), default=0)
    trained = [line for line in lines if line["kind"] == "train"]
    evaluated = [line for line in lines if line["kind"] == "eval" and line["step"] == done]
    last = any(line["kind"] in ("eval", "corpus") and line["step"] == done for line in lines)
    outcome = {"finished": (last or not evaluates) and done == steps, "step": done}
    for line in trained[-1:]:
        outcome |= {key: line[key] for key in ("tokens", "loss_nats", "bits_per_byte")}
    for line in evaluated[-1:]:
        outcome |= {f"validation_{key}": line[key] for key in ("loss_nats", "bits_per_byte", "accuracy") if key in line}
    return outcome


def _parameters(engine: Engine) -> int:
    """Return the number of parameters of the whole model, also under ZeRO-3."""
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in engine.module.parameters())
