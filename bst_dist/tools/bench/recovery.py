"""Kill a rank of a training run repeatedly, and time each phase until the run takes a new step.

    bst bench recovery
    bst bench recovery --kills 10 --ranks 2 --json recovery.json
    bst bench recovery --local-every 1                        # with local copies: almost no step is lost

A small model trains under `bst launch --launcher local`, with restarts. Each time it has taken some steps after its
last checkpoint, one of its ranks is killed. The phases follow from what the launching process prints, and when:

    detect      from the kill to the line that names the rank: its agent saw it end, the others reported their errors
    restart     to the line that lists the ranks of the restart: old agents and ranks ended, hosts checked again
    start       to the line with the step that it resumes from: Python, imports, ranks connected, checkpoint loaded
    first step  to the first step after that
    catch up    to the first step that had not been taken before

Then a model gives the share of time that trains (goodput), for published mean times between failures. Its assumptions
are printed too. The times depend on this machine and on its other load.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from bst_base.arguments import at_least, seconds
from bst_base.errors import UserError
from bst_base.terminal import Sheet, print_table
from bst_dist.tools.bench.goodput import ANCHORS, MEAN_TIMES, best_interval_s, goodput
from bst_dist.tools.bench.timing import Spread

PATIENCE_S = 600.0
REPORTED = r"^ *(\d+)/\d+ "
"""Pattern of the beginning of a step's line on the console."""
EVERY, BEYOND = 5, 3
"""Steps between checkpoints, and steps after a checkpoint at which a rank is killed."""


@dataclass(frozen=True)
class Recovery:
    """Seconds of one recovery by phase, and the number of steps lost."""

    detect_s: float
    restart_s: float
    start_s: float
    first_step_s: float
    catch_up_s: float
    steps_lost: int

    @property
    def to_step_s(self) -> float:
        """Seconds from the kill to the next step."""
        return self.detect_s + self.restart_s + self.start_s + self.first_step_s


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kills", type=at_least(1), default=5, metavar="N", help="recoveries to time (default: 5)")
    parser.add_argument("--ranks", type=at_least(1), default=2, metavar="N", help="ranks of the run (default: 2)")
    parser.add_argument(
        "--local-every",
        type=at_least(0),
        default=0,
        metavar="K",
        help="steps between local copies, from which the run then resumes (checkpoint.local_every; default: 0, none)",
    )
    parser.add_argument(
        "--cost",
        type=seconds,
        default=1.0,
        metavar="SECONDS",
        help=(
            "for the goodput model: how long training waits for a checkpoint (default: 1; `bst bench saving` "
            "measures it)"
        ),
    )
    parser.add_argument(
        "--interval",
        type=seconds,
        metavar="SECONDS",
        help="for the goodput model: time between checkpoints (default: the best for that cost)",
    )
    parser.add_argument(
        "--recovery",
        type=seconds,
        metavar="SECONDS",
        help="for the goodput model: time from a failure to the next step (default: the median measured here)",
    )
    parser.add_argument("--directory", type=Path, metavar="DIR", help="where to write (default: a temporary directory)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp(prefix="recovery-", dir=args.directory))
    try:
        recipe = _recipe(folder, args.local_every)
        with Launched(recipe, folder / "run", args.ranks, args.kills) as launched:
            found = [recover(launched, random.Random(number)) for number in range(args.kills)]
    finally:
        shutil.rmtree(folder)
    _print_phases(args, found)
    recovery_s = args.recovery or Spread.of([one.to_step_s for one in found]).median
    modelled = [_modelled(one, recovery_s, args) for one in MEAN_TIMES]
    _print_model(modelled, recovery_s, args.cost)
    return {
        "ranks": args.ranks,
        "local_every": args.local_every,
        "recoveries": [asdict(one) for one in found],
        "model": modelled,
    }


class Launched:
    """A run under `bst launch`, as a context manager that ends all its processes on exit."""

    def __init__(self, recipe: Path, run_dir: Path, ranks: int, restarts: int) -> None:
        self.run_dir = run_dir
        self.lines: list[tuple[float, str]] = []
        """Time and text of each line printed so far."""
        command = [sys.executable, "-m", "bst_dist", "launch"]
        words = [str(recipe), f"ranks={ranks}", "--run-dir", str(run_dir), "--launcher", "local"]
        self.process = subprocess.Popen(
            [*command, *words, "--max-restarts", str(restarts)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        threading.Thread(target=self._read, daemon=True).start()

    def __enter__(self) -> Launched:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()  # the kernel then also ends its agent, and the agent's ranks
            self.process.wait()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.append((time.monotonic(), line.rstrip()))

    def until(self, pattern: str, since: float) -> tuple[float, re.Match[str]]:
        """Wait for a line after `since` that matches `pattern`; return its time and the match.

        Raise UserError if the run ends, or PATIENCE_S seconds pass, without such a line.
        """
        deadline = time.monotonic() + PATIENCE_S
        looked = 0
        while time.monotonic() < deadline:
            for when, line in self.lines[looked:]:
                looked += 1
                if when > since and (found := re.search(pattern, line)):
                    return when, found
            if self.process.poll() is not None and looked == len(self.lines):
                break
            time.sleep(0.005)
        said = "\n".join(line for _, line in self.lines[-20:])
        raise UserError(f"the run never said {pattern!r}; its last lines:\n{said}")

    def steps(self, step: int, since: float) -> tuple[float, int]:
        """Wait for the report, after `since`, of a step that is at least `step`; return its time and number."""
        while True:
            when, found = self.until(REPORTED, since)
            if int(found[1]) >= step:
                return when, int(found[1])
            since = when

    def ranks(self) -> list[psutil.Process]:
        """Return the training processes of the run."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [one for one in children if "bst_dist.train" in one.cmdline()]


def recover(launched: Launched, chance: random.Random) -> Recovery:
    """Kill one rank some steps after a checkpoint, and time the phases of the recovery."""
    _, step = launched.steps(1, launched.lines[-1][0] if launched.lines else 0.0)
    goal = (step // EVERY + 2) * EVERY + BEYOND
    launched.steps(goal, 0.0)
    victim = chance.choice(launched.ranks())
    killed = time.monotonic()
    victim.kill()
    detected, _ = launched.until(r"rank \d+ on \S+ was killed by SIGKILL", killed)
    placed, _ = launched.until(r"\d+ ranks \(dp", detected)
    loaded, resumed = launched.until(r"resumed from step (\d+)", placed)
    reached = max(_step(line) for when, line in launched.lines if when < detected)
    first, _ = launched.steps(int(resumed[1]) + 1, loaded)
    new, _ = launched.steps(reached + 1, loaded)
    return Recovery(
        detected - killed, placed - detected, loaded - placed, first - loaded, new - first, reached - int(resumed[1])
    )


def _step(line: str) -> int:
    found = re.search(REPORTED, line)
    return int(found[1]) if found else 0


def _recipe(folder: Path, local_every: int) -> Path:
    """Write the recipe of a small model on random words that reports every step; return its path."""
    from bst_base.settings import dump, parse
    from bst_dist.config import Recipe
    from data_pipeline.prepare.corpus import PrepareConfig, prepare
    from data_pipeline.prepare.parallel import open_workers

    texts = folder / "texts"
    texts.mkdir()
    words = [f"w{number}" for number in range(200)]
    chance = random.Random(0)
    for number in range(40):
        (texts / f"{number:02}.txt").write_text(" ".join(chance.choices(words, k=800)))
    settings = {
        "source": {"kind": "folder", "path": str(texts), "pattern": "*.txt"},
        "output": str(folder / "corpus"),
        "tokenizer": {"vocab_size": 320},
        "validation_fraction": 0.2,
    }
    with open_workers(1) as workers:
        prepare(parse(PrepareConfig, settings), workers, lambda *_: None)
    model = {
        "width": 32,
        "heads": 2,
        "ffn": 64,
        "block": 8,
        "depth": 2,
        "mixer": "bst",
        "ssm": {"state": 4, "chunk": 4},
    }
    recipe = {
        "name": "recovery",
        "model": model,
        "data": {"corpus": str(folder / "corpus"), "prefetch": 0},
        "train": {"steps": 1_000_000, "sequence_length": 32, "sequences": 16, "precision": "fp32"},
        "evaluation": {"every": 0, "sequences": 16},
        "checkpoint": {"every": EVERY, "background": False, "local_every": local_every},
        "log": {"every": 1, "tensorboard": False},
    }
    path = folder / "recipe.yaml"
    path.write_text(dump(parse(Recipe, recipe)))
    return path


def _modelled(mean: Any, recovery_s: float, args: argparse.Namespace) -> dict[str, Any]:
    mean_s = mean.hours * 3600
    interval_s = args.interval or best_interval_s(mean_s, args.cost)
    share = goodput(mean_s, recovery_s, interval_s, args.cost)
    return {**asdict(mean), "interval_s": interval_s, "goodput": share}


def _print_phases(args: argparse.Namespace, found: list[Recovery]) -> None:
    names = {
        "detect": "detect_s",
        "restart": "restart_s",
        "start": "start_s",
        "first step": "first_step_s",
        "kill to step": "to_step_s",
        "catch up": "catch_up_s",
        "steps lost": "steps_lost",
    }
    local = f", local copies every {args.local_every}" if args.local_every else ""
    title = (
        f"{len(found)} kills of one of {args.ranks} ranks, checkpoints every {EVERY} steps{local}; "
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    )
    rows = [[name, str(Spread.of([float(getattr(one, field)) for one in found]))] for name, field in names.items()]
    print_table(Sheet(("phase", "seconds, median (range)"), rows), title)


def _print_model(modelled: list[dict[str, Any]], recovery_s: float, cost_s: float) -> None:
    columns = ("accelerators", "hours between failures", "seconds between checkpoints", "goodput")
    rows = [
        [f"{one['accelerators']:,}", f"{one['hours']}", f"{one['interval_s']:.0f}", f"{one['goodput']:.1%}"]
        for one in modelled
    ]
    print_table(Sheet(columns, rows), "share of time that trains, by a model")
    print(
        f"assumed: failures at random; {recovery_s:.1f} s from a failure to the next step, whatever the number of "
        f"ranks; training waits {cost_s:g} s for a checkpoint; spare hosts are at hand; none fails in a recovery."
    )
    for source in dict.fromkeys(one["source"] for one in modelled):
        print(f"hours between failures: {source}")
    print("\n".join(f"others: {anchor}" for anchor in ANCHORS))
