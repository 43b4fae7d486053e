"""The part of `bst bench gpu` that compares a run that was stopped and resumed with one that was not."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from bst_base.json_lines import read_lines
from bst_dist.checkpoint.directory import load_weights, newest_valid
from bst_dist.report.metrics import FILE
from bst_dist.tools.bench.gpu_sizes import BST, SMALL, Sizes


def resume(small: bool, until: float) -> dict[str, Any]:
    """Train six deterministic steps twice, once stopped after three and resumed; compare losses and weights bitwise."""
    sizes = SMALL if small else Sizes(depth=4, length=2048, rows=2, vocabulary=64)
    model = {name: getattr(sizes, name) for name in ("width", "heads", "block", "depth")}
    recipe = {
        "name": "resume",
        "ranks": 1,
        "deterministic": True,
        "model": model | BST | {"ffn": 4 * sizes.width},
        "data": {"synthetic": {"task": "copy", "lag": 8}},
        "train": {"steps": 6, "sequence_length": sizes.length, "sequences": sizes.rows},
        "schedule": {"warmup_steps": 2},
        "evaluation": {"every": 0, "sequences": 1},
        "log": {"tensorboard": False},
        "deepspeed": "zero1",
    }
    with tempfile.TemporaryDirectory(prefix="bst-bench-gpu-") as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe))
        for arguments in (["whole"], ["stopped", "--until", "3"], ["stopped", "--resume"]):
            _train(path, Path(folder), arguments, until)
        whole, stopped = (Path(folder) / name for name in ("whole", "stopped"))
        losses = [
            [line["loss_nats"] for line in read_lines(run / FILE) if line["kind"] == "train"]
            for run in (whole, stopped)
        ]
        weights = [load_weights(newest_valid(run)) for run in (whole, stopped)]
    equal = all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    return {"rows": [{"steps": len(losses[0]), "losses_equal": losses[0] == losses[1], "weights_equal": equal}]}


def _train(recipe: Path, folder: Path, arguments: list[str], until: float) -> None:
    run_dir, *more = arguments
    command = [sys.executable, "-m", "bst_dist", "train", str(recipe), "--run-dir", str(folder / run_dir)]
    left = max(1.0, until - time.monotonic())
    done = subprocess.run([*command, *more], check=False, capture_output=True, text=True, timeout=left)
    if done.returncode:
        raise RuntimeError(f"bst train ended with status {done.returncode}: {done.stderr[-2000:]}")
