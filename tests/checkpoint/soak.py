"""Kill a run repeatedly at random moments, and check that it ends like a run that was never killed.

    python tests/checkpoint/soak.py --kills 200 --ranks 2 --directory /tmp/soak
    python tests/checkpoint/soak.py --kills 200 --local-every 1 --directory /tmp/soak-local

Ranks are forked from this process, which has imported everything and prepared a small corpus, so a start takes one
second instead of ten. They are killed by SIGKILL at a random moment: one time in four while they connect and load, else
while they train, copy, write, commit and remove. One time in two all are killed at once, as when a machine is lost;
else one first, and the others a moment later. After each kill the newest checkpoint must be valid and no older than the
previous one. With local copies, a start must continue at most `--local-every` steps before the last reported step. In
the end all losses and weights must be bitwise equal to those of the undisturbed run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from bst_base.host import free_port
from bst_base.json_lines import read_lines
from bst_base.settings import dump, parse
from bst_dist.checkpoint.directory import committed, damage, directory, load_weights, step_of
from bst_dist.config import Recipe
from bst_dist.parallel.ranks import Ranks, choose_accelerator
from bst_dist.report.metrics import FILE
from bst_dist.study.comparison.equality import COMPUTED
from bst_dist.train.rundir import ENVIRONMENT
from bst_dist.train.start.request import Request
from data_pipeline.prepare.config import PrepareConfig
from data_pipeline.prepare.corpus import prepare
from data_pipeline.prepare.parallel import open_workers

PATIENCE_S = 600.0


@dataclass(frozen=True)
class Soak:
    """Settings of the soak test."""

    folder: Path
    ranks: int
    steps: int
    kills: int
    most_steps: int = 6
    """Most steps that a start takes before it is killed."""
    seed: int = 0
    local_every: int = 0
    """Steps between local copies; 0: none."""

    @property
    def recipe(self) -> Path:
        """The recipe of both runs."""
        return self.folder / "recipe.yaml"


def prepare_recipe(soak: Soak) -> None:
    """Prepare a corpus of random words, and a recipe that streams it, carries the past and saves every third step."""
    texts, corpus = soak.folder / "texts", soak.folder / "corpus"
    texts.mkdir(parents=True, exist_ok=True)
    words = ["for", "x", "=", "(", ")", "\n", "    ", "return", "naïve", "12", "+", "y", ":", "if", "else"]
    generator = np.random.default_rng(0)
    for number in range(40):
        (texts / f"{number:02}.txt").write_text(" ".join(generator.choice(words, 100 + 20 * number)))
    settings = {
        "source": {"kind": "folder", "path": str(texts), "pattern": "*.txt"},
        "output": str(corpus),
        "tokenizer": {"vocab_size": 320},
        "validation_fraction": 0.2,
    }
    with open_workers(1) as workers:
        prepare(parse(PrepareConfig, settings), workers, lambda *_: None)
    recipe = {
        "name": "soak",
        "seed": 3,
        "model": {
            "width": 16,
            "heads": 2,
            "ffn": 32,
            "block": 8,
            "depth": 2,
            "mixer": "bst",
            "ssm": {"state": 4, "chunk": 4},
        },
        "data": {"corpus": str(corpus), "prefetch": 0, "mode": "streaming"},
        "train": {"steps": soak.steps, "sequence_length": 32, "sequences": 4, "precision": "fp32", "carry": True},
        "evaluation": {"every": 0, "sequences": 4},
        "checkpoint": {
            "every": 3,
            "weights_every": 60,
            "local_every": soak.local_every,
            "local_directory": str(soak.folder / "memory"),
        },
        "log": {"tensorboard": False, "every": 50},
        "deepspeed": "ds_configs/zero2.json",
    }
    soak.recipe.write_text(dump(parse(Recipe, recipe)))


def start(soak: Soak, run: str) -> list[int]:
    """Fork the ranks of one start of a run, which resumes if it can; return their process ids."""
    port = free_port()
    return [_fork(soak, soak.folder / run, rank, port) for rank in range(soak.ranks)]


def _fork(soak: Soak, run_dir: Path, rank: int, port: int) -> int:
    if pid := os.fork():
        return pid
    status = 1
    try:
        log = os.open(f"{run_dir}.log", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        os.dup2(log, 1)
        os.dup2(log, 2)
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": soak.ranks, "MASTER_PORT": port}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", **{name: str(number) for name, number in numbers.items()}}
        torch.set_num_threads(1)
        from bst_dist.train.run import train

        ranks = Ranks()
        status = train(Request(soak.recipe, [], run_dir, True, None), ranks)
        ranks.barrier()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def wait_for(pids: Sequence[int], seconds: float) -> list[int | None]:
    """Return the exit statuses of processes, None for those that still run after `seconds`."""
    found: dict[int, int] = {}
    deadline = time.monotonic() + seconds
    while len(found) < len(pids) and time.monotonic() < deadline:
        for pid in set(pids) - set(found):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                found[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    return [found.get(pid) for pid in pids]


def wait_for_steps(run_dir: Path, steps: int, local: bool = False, seconds: float = PATIENCE_S) -> None:
    """Wait until the run has taken `steps` more steps than its newest checkpoint, or until `seconds` have passed.

    With `local`, count from the last reported step instead of the checkpoint.
    """
    wanted = (reported_steps(run_dir) if local else newest_step(run_dir)) + steps
    deadline = time.monotonic() + seconds
    begun = time.time()
    while time.monotonic() < deadline:
        path = run_dir / FILE
        if path.exists() and path.stat().st_mtime > begun and len(read_lines(path)) >= wanted:
            return
        time.sleep(0.02)


def reported_steps(run_dir: Path) -> int:
    """Return the number of steps that the run has reported."""
    return sum(line["kind"] == "train" for line in read_lines(run_dir / FILE))


def begun_at(run_dir: Path) -> list[int]:
    """Return the step from which each recorded start of the run has continued."""
    path = run_dir / ENVIRONMENT
    return [one["from_step"] for one in json.loads(path.read_text())["starts"]] if path.exists() else []


def step_seconds(run_dir: Path) -> float:
    """Return the median step time, which limits how far a start gets before it is killed; 0 if there is none yet."""
    lines = read_lines(run_dir / FILE)
    return median(line["step_time_s"] for line in lines if "step_time_s" in line) if lines else 0.0


def kill(pids: Sequence[int], chance: random.Random) -> None:
    """Kill all ranks, at once or one after another."""
    order = list(pids)
    chance.shuffle(order)
    together = chance.random() < 0.5
    for pid in order:
        os.kill(pid, signal.SIGKILL)
        if not together:
            time.sleep(chance.uniform(0, 0.2))
    for pid in order:
        os.waitpid(pid, 0)


def newest_step(run_dir: Path) -> int:
    """Return the step of the newest checkpoint, 0 if there is none. Assert that it is not damaged."""
    newest = next(iter(committed(run_dir)), None)
    assert newest is None or not damage(newest), damage(newest)
    return step_of(newest) if newest else 0


def disturb(soak: Soak, say: Any) -> Counter[str]:
    """Train with `soak.kills` kills, then to the end. Return counts of the state in which starts were killed."""
    chance, reached, found = random.Random(soak.seed), 0, Counter()
    run_dir = soak.folder / "disturbed"
    for number in range(soak.kills):
        done, starts = reported_steps(run_dir), len(begun_at(run_dir))
        pids = start(soak, "disturbed")
        local = soak.local_every > 0
        if chance.random() < 0.75:
            wait_for_steps(run_dir, chance.randint(1, soak.most_steps), local)
        else:
            wait_for_steps(run_dir, soak.most_steps, local, seconds=chance.uniform(0, 3))
        statuses = wait_for(pids, chance.uniform(0, 2) * step_seconds(run_dir))
        assert all(status is None for status in statuses), f"ended by itself before kill {number + 1}: {statuses}"
        partial = any((run_dir / "checkpoints").glob("*.partial"))
        kill(pids, chance)
        if local and len(begun := begun_at(run_dir)) > starts:
            found[f"{done - begun[-1]} steps lost"] += 1
            assert done - begun[-1] <= soak.local_every, f"kill {number} cost {done - begun[-1]} steps, to {begun[-1]}"
        now = newest_step(run_dir)
        assert now >= reached, f"kill {number + 1} cost the checkpoint of step {reached}: there is {now}"
        found["while a checkpoint was being written" if partial else "otherwise"] += 1
        found["starts that left a newer checkpoint"] += now > reached
        reached = now
        if (number + 1) % 10 == 0:
            say(f"{number + 1:>4} kills, at step {reached}")
    train_to_the_end(soak, "disturbed")
    return found


def train_to_the_end(soak: Soak, run: str) -> None:
    """Run one start without killing it."""
    pids = start(soak, run)
    statuses = wait_for(pids, PATIENCE_S)
    for pid in [pid for pid, status in zip(pids, statuses, strict=True) if status is None]:
        os.kill(pid, signal.SIGKILL)
    assert statuses == [0] * soak.ranks, f"{statuses}: see {soak.folder / run}.log"


def compare(soak: Soak) -> int:
    """Assert that both runs are bitwise equal; return the number of reports compared.

    Performance reports are not compared, because a kill between a local copy and such a report loses it.
    """
    runs = [soak.folder / name for name in ("whole", "disturbed")]
    keys = ("kind", "step", *COMPUTED)
    lines = [
        [{key: line.get(key) for key in keys} for line in read_lines(run / FILE) if line["kind"] != "performance"]
        for run in runs
    ]
    assert lines[0] == lines[1]
    weights = [load_weights(directory(run, soak.steps)) for run in runs]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        assert np.array_equal(tensor.numpy(), weights[1][name].numpy()), name
    return len(lines[0])


def endure(soak: Soak, say: Any = print) -> None:
    """Run the whole soak test. Raise AssertionError if a check fails."""
    choose_accelerator()
    import bst_dist.parallel.deepspeed_import  # noqa: F401 (else imported by every engine: seconds)
    from bst_dist.train import building

    building.peak_flops = lambda *_: 1e12  # not measured again at every start
    prepare_recipe(soak)
    begun = time.monotonic()
    train_to_the_end(soak, "whole")
    say(f"undisturbed: {soak.steps} steps in {time.monotonic() - begun:.0f} s")
    begun = time.monotonic()
    found = disturb(soak, say)
    say(f"disturbed: {soak.kills} kills in {time.monotonic() - begun:.0f} s: {dict(found)}")
    say(f"equal to the last bit: {compare(soak)} reports and all weights")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--local-every", type=int, default=0)
    parser.add_argument("--directory", type=Path, required=True)
    args = parser.parse_args()
    endure(
        Soak(args.directory, args.ranks, args.steps, args.kills, seed=args.seed, local_every=args.local_every),
        lambda text: print(text, flush=True),
    )


if __name__ == "__main__":
    main()
