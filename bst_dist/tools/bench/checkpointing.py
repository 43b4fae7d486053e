"""Measure what each activation checkpointing policy keeps between the passes, and what it costs in time.

    bst bench checkpointing launch/recipes/demo.yaml --rounds 3

Runs in one process, on synthetic tokens, with the recipe's layers at two depths: their difference is what one layer
adds, without the embedding and the loss. Memory is counted from the tensors themselves. On a CPU, offloaded inputs are
in the same memory as everything else; they have their own column.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from bst_base.terminal import Sheet, print_table
from bst_dist.activation import policy as activation
from bst_dist.activation.config import ActivationCheckpointingConfig
from bst_dist.config import Recipe, load_recipe
from bst_dist.model.lm import LanguageModel
from bst_dist.plan.memory.live import LiveBytes
from bst_dist.tools.bench.timing import Spread

DEPTHS = (4, 8)
POLICIES: tuple[str, ...] = get_args(ActivationCheckpointingConfig.model_fields["policy"].annotation)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="recipe that gives layers, lengths and precision")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="settings to change")
    parser.add_argument(
        "--rounds", metavar="N", type=int, default=5, help="timed rounds; each takes every policy in turn"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, print the table, and return every figure."""
    recipe = load_recipe(args.recipe, args.overrides)
    kept = {policy: [_held(recipe, policy, depth) for depth in DEPTHS] for policy in POLICIES}
    seconds = _processor_seconds(recipe, args.rounds)
    base = Spread.of(seconds["none"])
    rows = []
    for policy in POLICIES:
        (few, few_host), (many, many_host) = kept[policy]
        layers = DEPTHS[1] - DEPTHS[0]
        ratio = Spread.of([s / b for s, b in zip(seconds[policy], seconds["none"], strict=True)])
        rows.append(
            {
                "policy": policy,
                "kept_bytes_a_layer": (many - few) / layers,
                "on_the_host_bytes_a_layer": (many_host - few_host) / layers,
                "processor_s": seconds[policy],
                "time_ratio": vars(ratio),
            }
        )
    _print(recipe, rows, base)
    return {
        "recipe": recipe.model_dump(mode="json"),
        "depths": DEPTHS,
        "threads": torch.get_num_threads(),
        "policies": rows,
    }


def _model(recipe: Recipe, policy: str, depth: int) -> LanguageModel:
    """Build a model of `depth` layers.

    The first DEPTHS[0] layers have the mixers that the recipe has at the same fractions of its depth. Deeper layers
    repeat this pattern.
    """
    own = recipe.model
    pattern = [own.mixers()[place * own.depth // DEPTHS[0]] for place in range(DEPTHS[0])]
    places = [place for place in range(depth) if pattern[place % DEPTHS[0]] == own.mixer]
    config = own.model_copy(update={"depth": depth, "placement": places, "vocab_size": own.vocab_size or 256})
    torch.manual_seed(recipe.seed)
    model = LanguageModel(config)
    checkpointing = recipe.activation_checkpointing.model_copy(update={"policy": policy})
    model.checkpoint = activation.policy(checkpointing, model.layers)
    return model


def _tokens(recipe: Recipe) -> tuple[Tensor, Tensor]:
    shape = recipe.train.micro_sequences, recipe.train.sequence_length + 1
    ids = torch.randint(0, recipe.model.vocab_size or 256, shape, generator=torch.Generator().manual_seed(0))
    return ids[:, :-1], ids[:, 1:]


def _forward(recipe: Recipe, model: LanguageModel, inputs: Sequence[Tensor]) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=recipe.train.precision == "bf16"):
        return model(*inputs).total


def _held(recipe: Recipe, policy: str, depth: int) -> tuple[int, int]:
    """Return the bytes that stay allocated between forward and backward, and the bytes offloaded to the host.

    The model's parameters and the inputs are not counted.
    """
    model = _model(recipe, policy, depth)
    inputs = _tokens(recipe)
    with LiveBytes() as live:
        for tensor in (*model.parameters(), *inputs):
            live.add(tensor)
        before = live.mark()
        total = _forward(recipe, model, inputs)
        held = live.now - before
    host = model.checkpoint.host.bytes if policy == "offload" else 0
    total.backward()
    return held, host


def _processor_seconds(recipe: Recipe, rounds: int) -> dict[str, list[float]]:
    """Return the CPU seconds of forward plus backward, by policy and round.

    CPU time and not wall-clock time, because machines are shared. A first round warms up and is not counted.
    """
    models = {policy: _model(recipe, policy, DEPTHS[0]) for policy in POLICIES}
    inputs = _tokens(recipe)
    seconds: dict[str, list[float]] = {policy: [] for policy in POLICIES}
    for round_ in range(rounds + 1):
        for policy, model in models.items():
            begin = time.process_time()
            _forward(recipe, model, inputs).backward()
            if round_:
                seconds[policy].append(time.process_time() - begin)
    return seconds


def _print(recipe: Recipe, rows: list[dict[str, Any]], base: Spread) -> None:
    tokens = recipe.train.micro_sequences * recipe.train.sequence_length
    unit = tokens * recipe.model.width
    cells = []
    for row in rows:
        kept, host = row["kept_bytes_a_layer"], row["on_the_host_bytes_a_layer"]
        policy = f"one layer in {recipe.activation_checkpointing.every}" if "kth" in row["policy"] else row["policy"]
        cells.append(
            [
                policy,
                f"{kept / 1024:,.0f}",
                f"{kept / unit:.1f}",
                f"{host / unit:.1f}",
                str(Spread(**row["time_ratio"])),
            ]
        )
    columns = ("policy", "KiB kept per layer", "bytes per token and width", "on the host", "time, of none's")
    print_table(
        Sheet(columns, cells),
        f"{recipe.name}: {tokens:,} tokens, width {recipe.model.width}, "
        f"{recipe.train.precision}; {DEPTHS[0]} layers, both passes: {base.median:.2f} s",
    )
