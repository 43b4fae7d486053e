"""What every rank does: put the run together, train, leave a checkpoint."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from bst_dist.activation import policy as activation
from bst_dist.checkpoint import rng
from bst_dist.checkpoint.directory import CheckpointError, committed, step_of
from bst_dist.checkpoint.fragments import EngineState
from bst_dist.checkpoint.layout import Layout, Rows
from bst_dist.checkpoint.retention import abandon
from bst_dist.checkpoint.snapshot import Checkpoints, Evaluated, Identity, Position, Snapshots
from bst_dist.config import digest, identity
from bst_dist.faults import ledger
from bst_dist.faults.guard import DivergedError, Guard, RollBack
from bst_dist.faults.lease import SharedLease, shared_lease
from bst_dist.faults.signals import Notice, Stop
from bst_dist.faults.status import DONE, RESUBMIT
from bst_dist.faults.watchdog import Watchdog
from bst_dist.model.attention import attention_path
from bst_dist.parallel.communication import WatchedGroup
from bst_dist.parallel.group import SequenceGroup
from bst_dist.parallel.mesh import Mesh
from bst_dist.parallel.ranks import Ranks
from bst_dist.plan.flops import train_flops_per_token
from bst_dist.plan.hardware import peak_flops
from bst_dist.report.metrics import FILE, Console, Log, MetricsFile, Writer, read_lines
from bst_dist.report.performance import Performance
from bst_dist.report.probes import Probes
from bst_dist.report.profiling import Profile
from bst_dist.report.tensorboard import TensorBoard, hparams
from bst_dist.report.utilisation import Speed, edge_flops_per_token, recomputed_flops_per_token
from bst_dist.train import rundir
from bst_dist.train.branch import origin
from bst_dist.train.compiling import compiles
from bst_dist.train.continuing import fixed
from bst_dist.train.engine import Engine
from bst_dist.train.evaluation import Evaluate
from bst_dist.train.initial import load_initial
from bst_dist.train.loop import Trainer
from bst_dist.train.start import Request, Start, load, resolve
from data_pipeline.serve.slices import slices_of


def train(request: Request, ranks: Ranks, notice: Notice | None = None) -> int:
    """Train from the newest valid checkpoint, or from the beginning, to the end asked for; returns the exit status.

    `notice`: what this process has been told; a signal to any rank ends the training of all with a checkpoint, and
    the status is RESUBMIT. Raises UserError on every rank when the run cannot start, and when it diverges.
    """
    start = resolve(load(request), request, ranks.world)
    ranks.barrier()  # all have looked at the run directory before the first one writes to it
    with (
        shared_lease(ranks, start.run_dir) as lease,
        Watchdog(start.recipe.watchdog, start.run_dir, ranks.rank, ranks.world, ranks.phases),
    ):
        return _train(start, request, ranks, Stop(ranks, notice), lease)


def _train(start: Start, request: Request, ranks: Ranks, stop: Stop, lease: SharedLease) -> int:
    """Put the run together, and train."""
    stage = start.completed["zero_optimization"]["stage"]
    compiled, uncompiled_since = compiles(start.recipe, ranks.device.type, stage)
    engine = _engine(start, compiled)
    state = EngineState(engine.deepspeed)
    identity = _identity(start, engine, ranks)
    snapshots = Snapshots(start.run_dir, state, ranks, identity, start.recipe.checkpoint, lease)
    sharing = _mesh(start, ranks).sp_group()
    sharing = sharing and WatchedGroup(sharing.process_group, ranks.phases)
    trainer = _trainer(start, engine, ranks, sharing, stop)
    rng.seed_all(start.recipe.seed, ranks.rank)
    position = _resume(request, start, snapshots, trainer)
    snapshots.rehearse()
    hosts = sorted(set(ranks.gather(socket.gethostname())))
    if ranks.first:
        about = {"ranks": ranks.world, "hosts": hosts, "from_step": position.step, **start.objective.about()}
        rundir.prepare(start.run_dir, start.recipe, start.completed, about)
        print(_header(start, engine, ranks, uncompiled_since or "yes"), flush=True)
    try:
        while position is not None:
            position = _go_on(start, snapshots, trainer, position)
    except DivergedError as error:
        snapshots.finish()  # what was under way is from before
        if ranks.first:
            rundir.finish(start.run_dir, {"finished": False, "diverged": str(error)})
        ranks.barrier()  # all diverge alike, and when the first is gone the others may be ended
        raise
    return _end(start, ranks, stop)


def _go_on(start: Start, snapshots: Snapshots, trainer: Trainer, position: Position) -> Position | None:
    """Take steps from `position` to the end; returns where to go on from when the run was rolled back, else None."""
    ranks, recipe = trainer.ranks, start.recipe
    trainer.tokens, trainer.carried, trainer.skipped = position.tokens, position.carried, position.skipped
    evaluated = Evaluated()
    writers = [*_writers(start, trainer.engine, ranks, position.step), evaluated] if ranks.first else []
    trainer.guard = _guard(start, ranks, position)
    loader = start.objective.loader(_mesh(start, ranks), position.step + position.skipped)
    if position.data:
        loader.check(position.data)  # and goes on in the version of the order that the run began with
    evaluate = start.objective.evaluation(trainer, writers)
    say = partial(_say, ranks)
    if recipe.log.tensorboard:
        evaluate.probes = _probes(start, trainer, evaluate, say)

    def data_state(step: int) -> dict[str, Any]:
        return loader.state(step + position.skipped)

    callbacks = [
        Log(writers),
        evaluate,
        Checkpoints(recipe.checkpoint, snapshots, trainer, evaluated, data_state, say),
        Performance(recipe.log.every, ranks, writers, trainer.sharing),
    ]
    if recipe.log.profile:
        callbacks.append(Profile(recipe.log.profile, start.run_dir, ranks.rank, position.step, say))
    try:
        if ranks.from_first(ranks.first and evaluate.owed(_lines(start), position.step)):
            evaluate.make(position.step)
        if position.step >= start.until:
            say(f"nothing to do: {position.step} of {start.until} steps are done")
        elif not trainer.stop.poll():
            trainer.run(loader, start.until, callbacks)
        return None
    except RollBack as back:
        return _roll_back(start, snapshots, trainer, back.entry)
    finally:
        loader.close()
        with suppress(OSError):  # when the disk is full that was said before
            for writer in writers:
                writer.close()


def _guard(start: Start, ranks: Ranks, position: Position) -> Guard:
    """The guard of a run that goes on from `position`: what it has seen is in the files that tell the run."""
    seen = None
    if ranks.first:
        losses = [line["loss_nats"] for line in _lines(start) if line["kind"] == "train"]
        seen = ledger.read(start.run_dir, position.step, position.skipped), losses[-start.recipe.guard.spike_window :]
    entries, losses = ranks.from_first(seen)
    book = ledger.Ledger(entries, start.run_dir / ledger.FILE if ranks.first else None)
    if start.changed and not any(entry.cause == "; ".join(start.changed) for entry in entries):
        book.add(ledger.Entry(position.step, position.skipped, "; ".join(start.changed), ledger.CHANGE))
    return Guard(start.recipe.guard, book, losses)


def _roll_back(start: Start, snapshots: Snapshots, trainer: Trainer, entry: ledger.Entry) -> Position:
    """Load the last checkpoint, to go on from there with the data that follows the step in question."""
    _say(trainer.ranks, f"{entry.cause}: rolling back to the last checkpoint, and skipping the data up to that step")
    before = _newest(start, snapshots, trainer.ranks, scheduled=True)
    if before is None:
        trainer.guard.ledger.add(replace(entry, action="stop"))
        raise DivergedError(f"{entry.cause}, and there is no checkpoint yet to roll back to: that step was not taken")
    trainer.guard.ledger.add(replace(entry, back_to=before.step))
    if trainer.ranks.first:
        abandon(start.run_dir, before.step)
    # The past of the rows is of data that does not come before what they read now.
    return replace(before, skipped=entry.data_step - before.step, carried=[])


def _end(start: Start, ranks: Ranks, stop: Stop) -> int:
    """Write down how this start ended; returns the exit status, which all ranks have in common."""
    outcome = _outcome(_lines(start), start.recipe.train.steps) if ranks.first else None
    outcome = ranks.from_first(outcome)
    told = [signal for signal in ranks.gather(stop.notice.signal) if signal is not None]
    stopped = stop.agreed and not outcome["finished"]
    if stopped:
        outcome |= {"stopped": told[0].name}
        _say(ranks, f"stopped by {told[0].name} after step {outcome['step']}: --resume continues from there")
    if ranks.first:
        rundir.finish(start.run_dir, outcome)
    ranks.barrier()  # when the first rank is gone its launcher may end the others
    return RESUBMIT if stopped else DONE


def _engine(start: Start, compiled: bool = False) -> Engine:
    """The model, equal on all ranks, in DeepSpeed's hands; its layers compiled or not."""
    torch.manual_seed(start.recipe.seed)
    model = start.objective.model()
    if start.recipe.initial_weights and not committed(start.run_dir):
        load_initial(model, start.recipe.initial_weights, start.objective.about().get("tokenizer_sha256"))
    model.checkpoint = activation.policy(start.recipe.activation_checkpointing, model.layers)
    for layer in model.layers:
        layer.compiled = compiled
    return Engine(model, start.recipe.optimizer, start.completed)


def _identity(start: Start, engine: Engine, ranks: Ranks) -> Identity:
    """What a checkpoint must have in common with the run that goes on from it, and the layout, which may be another."""
    recipe = start.recipe
    return Identity(
        recipe=digest(recipe),
        settings=fixed(identity(recipe, defaults=False)),
        groups=engine.groups.describe(),
        seed=recipe.seed,
        layout=Layout(ranks.world, recipe.parallel.sp, engine.stage),
        rows=Rows(recipe.train.sequences, recipe.train.micro_sequences, _mesh(start, ranks)),
    )


def _trainer(start: Start, engine: Engine, ranks: Ranks, sharing: SequenceGroup | None, stop: Stop) -> Trainer:
    recipe, length = start.recipe, start.recipe.train.sequence_length
    token_bytes, tokens = start.objective.token_bytes().to(ranks.device), start.objective.tokens_per_label
    dtype = torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32
    ranks.barrier()  # ranks that share a processor measure its peak together
    (peak,) = ranks.sum([peak_flops(ranks.device, dtype)])
    again = recomputed_flops_per_token(
        recipe.model, length, recipe.activation_checkpointing, engine.module.layers, attention_path(ranks.device)
    ) + edge_flops_per_token(recipe.model, length, recipe.train.slices)
    speed = Speed(tokens * train_flops_per_token(recipe.model, length), peak, tokens * again)
    return Trainer(recipe.train, recipe.schedule, engine, ranks, token_bytes, speed, sharing, stop)


def _resume(request: Request, start: Start, snapshots: Snapshots, trainer: Trainer) -> Position:
    """Take up the newest valid checkpoint when asked to, or the trunk's; else the beginning."""
    position = _newest(start, snapshots, trainer.ranks, own=request.resume)
    if position is not None:
        start.objective.loader(_mesh(start, trainer.ranks)).check(position.data)
        return position
    if initial := start.recipe.initial_weights:
        if committed(start.run_dir):
            raise CheckpointError(f"{start.run_dir}: no valid checkpoint to resume: start a run in another --run-dir")
        _say(trainer.ranks, f"starting from the weights of step {initial.step} of {initial.run}")
    shown = trainer.ranks.from_first(rundir.shown_steps(start.run_dir) if trainer.ranks.first else None)
    if shown and not request.from_zero:
        raise CheckpointError(
            f"{start.run_dir}: {shown}, and none of its checkpoints is valid; restore one, or start at step 0 with "
            f"{rundir.FROM_ZERO}"
        )
    if request.resume:
        _say(trainer.ranks, f"no checkpoint in {start.run_dir} yet: starting at step 0")
    return Position(step=0, tokens=0, data={}, carried=[])


def _newest(
    start: Start, snapshots: Snapshots, ranks: Ranks, own: bool = True, scheduled: bool = False
) -> Position | None:
    """Load the run's own newest valid checkpoint, or else the one that it branches off, or else nothing."""
    checkpoint, damaged = snapshots.newest(scheduled) if own else (None, [])
    for reason in damaged:
        then = f"resuming from {step_of(checkpoint)}" if checkpoint else "no older checkpoint is valid"
        _say(ranks, f"{reason}; {then}")
    if checkpoint is not None:
        position = snapshots.load(checkpoint)
    elif start.recipe.branch is not None:
        position = _branch_off(start, snapshots)
        checkpoint = origin(start.run_dir, start.recipe).checkpoint
    else:
        return None
    _say(ranks, f"resumed from step {position.step} of {checkpoint}")
    if change := snapshots.change(checkpoint):
        _say(ranks, f"layout changed: {change}")
    return position


def _branch_off(start: Start, snapshots: Snapshots) -> Position:
    """Load the trunk's checkpoint that the run begins at."""
    begin = origin(start.run_dir, start.recipe)
    snapshots.require_whole(begin.checkpoint)
    return snapshots.load(begin.checkpoint, of_trunk=True)


def _mesh(start: Start, ranks: Ranks) -> Mesh:
    return Mesh(ranks.world, ranks.rank, start.recipe.parallel.sp)


def _writers(start: Start, engine: Engine, ranks: Ranks, done: int) -> list[Writer]:
    log = start.recipe.log
    writers = [MetricsFile(start.run_dir, done), Console(log.every, start.recipe.train.steps, log.straggler)]
    if not log.tensorboard:
        return writers
    about = hparams(start.recipe, parameters=_parameters(engine), ranks=ranks.world)
    return [*writers, TensorBoard(start.run_dir, done, about)]


def _probes(start: Start, trainer: Trainer, evaluate: Evaluate, say: Callable[[str], None]) -> Probes:
    """What looks into the model at evaluations; samples of text go on from the first validation sequence."""
    tokenizer = start.objective.tokenizer()
    prompt: list[int] = []
    if tokenizer is not None:
        first = slices_of(evaluate.batches[0])[0]
        ids, counts = first.input_ids[0], first.loss_mask[0]
        prompt = ids[: max(1, int(counts.cumprod().sum()))].tolist()  # where documents are isolated, of the first alone
    return Probes(start.recipe.log, trainer.engine, trainer.ranks, evaluate.writers, tokenizer, prompt, say)


def _lines(start: Start) -> list[dict[str, Any]]:
    """What the run has reported so far."""
    return read_lines(start.run_dir / FILE)


def _outcome(lines: Sequence[dict[str, Any]], steps: int) -> dict[str, Any]:
    """How far a run of `steps` steps has come: the last that was taken, and the evaluation after the last if any."""
    done = max((line["step"] for line in lines if line["kind"] in ("train", "skipped")), default=0)
    trained = [line for line in lines if line["kind"] == "train"]
    evaluated = [line for line in lines if line["kind"] == "eval" and line["step"] == done]
    found = {"finished": bool(evaluated) and done == steps, "step": done}
    for line in trained[-1:]:
        found |= {key: line[key] for key in ("tokens", "loss_nats", "bits_per_byte")}
    for line in evaluated[-1:]:
        found |= {f"validation_{key}": line[key] for key in ("loss_nats", "bits_per_byte", "accuracy") if key in line}
    return found


def _header(start: Start, engine: Engine, ranks: Ranks, compiled: str) -> str:
    recipe, model, world = start.recipe, start.recipe.model, ranks.world
    layers = ", ".join(f"{count} {mixer}" for mixer, count in Counter(model.mixers()).items())
    tokens = recipe.train.sequences * recipe.train.sequence_length
    size = f"{_parameters(engine) / 1e6:,.2f} M parameters"
    micro = f"{start.accumulation} micro-batch{'es' if start.accumulation > 1 else ''}"
    mesh = f"dp {world // recipe.parallel.sp} x sp {recipe.parallel.sp}"
    lines = {
        "run": f"{start.run_dir}",
        "model": f"{layers} layers, width {model.width}, block {model.block}: {size}",
        "ranks": f"{world} ({mesh}), ZeRO-{engine.stage}, {recipe.train.precision}, "
        f"activation checkpointing: {recipe.activation_checkpointing.describe()}, "
        f"attention: {attention_path(ranks.device)}",
        "placed": f"rank 0 on {ranks.device}, {ranks.threads} threads, cores {ranks.cores} of {socket.gethostname()}",
        "step": f"{recipe.train.sequences} sequences of {recipe.train.sequence_length:,} = {tokens:,} tokens, "
        f"{micro} a rank",
    }
    if recipe.train.slice_tokens:
        slices = recipe.train.sequence_length // recipe.train.slice_tokens
        lines["slices"] = f"{slices:,} of {recipe.train.slice_tokens:,} tokens, edges: {recipe.train.edges}"
    if ranks.device.type != "cpu":
        lines["layers"] = f"compiled: {compiled}"
    if start.changed:
        lines["change"] = f"{'; '.join(start.changed)} (before, from here on)"
    if unused := model.unused_sections():
        lines["unused"] = f"no layer reads {', '.join(f'model.{section}' for section in unused)}, which is set"
    return "\n".join([*(f"{name:<6} {text}" for name, text in lines.items()), Console.header(start.objective.labels)])


def _parameters(engine: Engine) -> int:
    """Of the model, also where ZeRO-3 has spread them."""
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in engine.module.parameters())


def _say(ranks: Ranks, text: str) -> None:
    if ranks.first:
        print(text, flush=True)
