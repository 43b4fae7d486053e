"""Go from text to a trained and evaluated model on this machine, in minutes.

Prepares Python's standard library as a corpus; trains a small Block-State Transformer on two ranks, stops halfway and
resumes; trains the same model without a stop and checks that both are bitwise equal; evaluates before and after
training, with an order-2 byte model and xz for comparison; generates a sample and draws the curves. Each step is shown
as the command that you would type. Finished steps are reused. To start over, remove runs/demo and
runs/demo-uninterrupted.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bst_base.errors import UserError
from bst_base.terminal import Sheet, print_table
from bst_dist.checkpoint.directory import committed, directory, step_of
from bst_dist.config import Recipe, differing, load_recipe
from bst_dist.plan.hardware import SLOW_BF16, bf16_slowdown
from bst_dist.train.rundir import RECIPE as STORED_RECIPE
from bst_dist.train.rundir import read_outcome, read_recipe

CORPUS, RECIPE = "stdlib", "demo"
PROMPT = "def read_"


@dataclass
class Demo:
    """The steps of the demo. Each step runs one or more `bst` commands; `seconds` holds how long each step took."""

    recipe: Recipe
    console: Console = field(default_factory=Console)
    overrides: list[str] = field(default_factory=list)
    """Settings that override the recipe, as `section.field=value`."""
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.run_dir = Path("runs") / self.recipe.name
        self.twin = Path("runs") / f"{self.recipe.name}-uninterrupted"
        self.reports = self.run_dir / "reports"
        self.half = self.recipe.train.steps // 2

    def suit(self, slowdown: float) -> None:
        """Choose the precision: fp32 if a bf16 product is at least SLOW_BF16 times as slow, else bf16.

        Existing runs keep their precision.
        """
        stored = [read_recipe(run_dir) for run_dir in (self.run_dir, self.twin) if (run_dir / STORED_RECIPE).exists()]
        fitting = "fp32" if slowdown >= SLOW_BF16 else "bf16"
        precision = stored[0].train.precision if stored else fitting
        if precision == self.recipe.train.precision:
            return
        train = self.recipe.train.model_copy(update={"precision": precision})
        self.recipe = self.recipe.model_copy(update={"train": train})
        self.overrides = [f"train.precision={precision}"]
        why = (
            "the existing runs use it"
            if stored
            else f"this CPU multiplies matrices {slowdown:.0f} times as slowly in bf16"
        )
        self.console.print(f"Training in {precision}: {why}.", markup=False, highlight=False, soft_wrap=True)

    def require_same_recipe(self) -> None:
        """Raise UserError if the run directories hold runs of another recipe."""
        for run_dir in (self.run_dir, self.twin):
            if (run_dir / STORED_RECIPE).exists():
                there = read_recipe(run_dir)
                if found := differing(there, self.recipe.of_vocabulary(there.model.vocab_size)):
                    raise UserError(
                        f"{run_dir} holds a run of another recipe than {RECIPE} ({'; '.join(found)}): "
                        "remove it to start again, or give your recipe another name and train it with `bst train`"
                    )

    def steps(self) -> list[tuple[str, Callable[[], None]]]:
        """Return the title and the action of each step, in order."""
        return [
            ("Prepare a corpus from Python's standard library", self.prepare),
            (f"Train on {self.recipe.ranks} ranks, and stop after {self.half} of {self._steps} steps", self.train_half),
            ("Resume, to the end", self.resume),
            ("Train the same model without a stop", self.train_twin),
            ("Are the two runs equal?", self.compare),
            ("Baselines on the same validation text", self.baselines),
            ("Evaluate before training (random weights) and after", self.evaluate),
            ("Write a sample", self.sample),
            ("Draw the curves", self.plot),
        ]

    def prepare(self) -> None:
        self._bst("data", "prepare", CORPUS)

    def train_half(self) -> None:
        done = step_of(committed(self.run_dir)[0]) if committed(self.run_dir) else 0
        if done >= self.half:
            self._reuse(f"{self.run_dir} has reached step {done}")
        else:
            self._bst("train", RECIPE, *self.overrides, "--until", self.half, *(["--resume"] if done else []))

    def resume(self) -> None:
        if self._finished(self.run_dir):
            self._reuse(f"{self.run_dir} is finished")
        else:
            self._bst("train", RECIPE, *self.overrides, "--resume")

    def train_twin(self) -> None:
        if self._finished(self.twin):
            self._reuse(f"{self.twin} is finished")
        else:
            self._bst("train", RECIPE, *self.overrides, "checkpoint.every=0", "--run-dir", self.twin)

    def compare(self) -> None:
        self._bst("compare", self.run_dir, self.twin, "--equal", "--json", self.reports / "compare.json", accept=(0, 1))

    def baselines(self) -> None:
        self._report("baselines", "baselines", self.recipe.data.corpus)

    def evaluate(self) -> None:
        self._report("before", "eval", self.run_dir, "--checkpoint", 0)
        self._report("after", "eval", self.run_dir)

    def sample(self) -> None:
        self._report("sample", "generate", self.run_dir, "--prompt", PROMPT, "--tokens", 160)

    def plot(self) -> None:
        self._bst("plot", self.run_dir)

    @property
    def _steps(self) -> int:
        return self.recipe.train.steps

    def _finished(self, run_dir: Path) -> bool:
        outcome = read_outcome(run_dir)
        return bool(outcome and outcome["finished"]) and directory(run_dir, self._steps).is_dir()

    def _report(self, name: str, *command: Any) -> None:
        """Run a command that writes a report, unless a report exists that is newer than the final checkpoints."""
        path = self.reports / f"{name}.json"
        made = [directory(run_dir, self._steps).stat().st_mtime for run_dir in (self.run_dir, self.twin)]
        if path.exists() and path.stat().st_mtime > max(made):
            self._reuse(f"{path} is newer than the runs")
        else:
            self._bst(*command, "--json", path)

    def _reuse(self, why: str) -> None:
        self.console.print(f"reused: {why}", markup=False, highlight=False)

    def _bst(self, *command: Any, accept: tuple[int, ...] = (0,)) -> None:
        """Print one `bst` command as a user would type it, and run it.

        Raise UserError if its exit status is not in `accept`.
        """
        words = [str(word) for word in command]
        self.console.print(f"$ bst {shlex.join(words)}", style="bold", markup=False, highlight=False, soft_wrap=True)
        done = subprocess.run([sys.executable, "-m", "bst_dist", *words], check=False)
        if done.returncode not in accept:
            raise UserError(f"stopped: `bst {shlex.join(words)}` ended with status {done.returncode}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(args: argparse.Namespace) -> dict[str, Any]:
    demo = Demo(load_recipe(RECIPE))
    demo.suit(1.0 if torch.accelerator.is_available() else bf16_slowdown())
    demo.require_same_recipe()
    steps = demo.steps()
    for number, (title, action) in enumerate(steps, 1):
        demo.console.rule(f"[bold]{number}/{len(steps)}  {title}", align="left")
        started = time.perf_counter()
        action()
        demo.seconds[title] = time.perf_counter() - started
    report = collect(demo)
    show(demo, report)
    return report


def collect(demo: Demo) -> dict[str, Any]:
    """Return the results that the commands have reported, in one dictionary."""
    found = {name: _read(demo, name) for name in ("before", "after", "baselines", "compare", "sample")}
    before, after = (found[name]["corpora"][0] for name in ("before", "after"))
    keys = ("bits_per_byte", "bits_per_byte_standard_error")
    return {
        "passed": found["compare"]["passed"],
        "steps": {"stopped": demo.half, "all": demo.recipe.train.steps},
        "before": {key: before[key] for key in keys},
        "after": {key: after[key] for key in keys},
        "order2": {key: found["baselines"][f"order2_{key}"] for key in keys},
        "xz9": {"bits_per_byte": found["baselines"]["xz9_bits_per_byte"]},
        "validation": {key: after[key] for key in ("documents", "tokens", "bytes")},
        "resume_largest_difference": found["compare"]["largest_difference"],
        "time_s": demo.seconds,
    }


def _read(demo: Demo, name: str) -> dict[str, Any]:
    return json.loads((demo.reports / f"{name}.json").read_text())


def show(demo: Demo, report: dict[str, Any]) -> None:
    """Print the last screen: results, files, and what to try next."""
    console, validation = demo.console, report["validation"]
    console.rule(f"[bold]Done in {sum(report['time_s'].values()) / 60:.1f} minutes", align="left")
    title = f"The validation text: {validation['bytes']:,} bytes in {validation['documents']} documents"
    rows = []
    for name, key in (
        ("before training: random weights", "before"),
        (f"after {demo.recipe.train.steps:,} steps", "after"),
        ("order-2 byte model, trained on the training text", "order2"),
        ("xz -9, which sees only this text", "xz9"),
    ):
        figures = report[key]
        error = figures.get("bits_per_byte_standard_error")
        rows.append([name, f"{figures['bits_per_byte']:.4f}" + ("" if error is None else f" ± {error:.4f}")])
    print_table(Sheet(("", "bits per byte"), rows), title, "± standard error over documents")
    console.print(_verdict(report), highlight=False)
    equal = "[green]resumed run equals uninterrupted run" if report["passed"] else "[red]resumed run DIFFERS"
    largest = report["resume_largest_difference"]
    rest = max(difference for name, difference in largest.items() if name != "weights")
    console.print(
        f"{equal}[/]: stopped after {demo.half} of {demo.recipe.train.steps} steps; largest difference "
        f"{rest} at any step, {largest['weights']} in the final weights",
        highlight=False,
    )
    console.print(_guide(demo), highlight=False, soft_wrap=True)


def _verdict(report: dict[str, Any]) -> str:
    """Return one line that ranks the trained model, the byte model and xz by bits per byte."""
    names = {"after": "the trained model", "order2": "the order-2 byte model", "xz9": "xz -9"}
    ranking = sorted(names, key=lambda key: report[key]["bits_per_byte"])
    first, second, third = (f"{names[key]} ({report[key]['bits_per_byte']:.2f})" for key in ranking)
    return f"fewest bits: {first}, then {second}, then {third}"


def _guide(demo: Demo) -> str:
    run_dir, corpus = demo.run_dir, demo.recipe.data.corpus
    train = " ".join([RECIPE, *demo.overrides])
    return f"""
[bold]Files[/]
  {f"{corpus}/":<22}  the corpus: tokenizer, WebDataset shards, index
  {f"{run_dir}/":<24}the run: recipe.yaml, metrics.jsonl, checkpoints/, tensorboard/, reports/
  {f"{run_dir}/curves.png":<24}the curves

[bold]What to try next[/]
  . .venv/bin/activate          # so that the commands below are found
  bst generate {run_dir} --prompt "class Cache:" --temperature 0.6
  bst train {train} name=longer train.steps={4 * demo.recipe.train.steps}
  bst train {train} name=sliding model.mixer=sliding && bst compare {run_dir} runs/sliding --plot compared.png
  bst eval {run_dir} --lengths 512,4096,16384      # how far back does it look, and how far can it?
  bst ablate {run_dir}          # what do its context states carry?
  bst plan {RECIPE} --nodes 2   # and on 16 GPUs?
  tensorboard --logdir runs
  rm -r runs/demo runs/demo-uninterrupted && make demo   # the demo again

Documentation by task: docs/README.md"""
