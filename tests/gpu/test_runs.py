"""Whole runs of `bst train` on one GPU, started as a user starts them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

REHEARSAL = os.environ.get("BST_REHEARSE_GPU") == "1"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (REHEARSAL or torch.cuda.is_available()), reason="no CUDA device"),
]


def bst(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "bst_dist", *map(str, arguments)], check=True, timeout=900)


def losses(run: Path, kind: str = "train") -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["loss_nats"] for line in lines if line["kind"] == kind]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("gpu") / "corpus"
    bst("data", "prepare", "launch/data/stdlib.yaml", f"output={made}")
    return made


@pytest.fixture
def train(corpus, tmp_path):
    """``train(run, *words)`` trains the demo's model on one GPU with ZeRO-2 and returns the run directory."""

    def of(run: str, *words: object) -> Path:
        bst(
            "train",
            "launch/recipes/demo.yaml",
            f"data.corpus={corpus}",
            "ranks=1",
            "schedule.warmup_steps=5",
            "evaluation.every=0",
            *words,
            "--run-dir",
            tmp_path / run,
        )
        return tmp_path / run

    return of


@pytest.mark.skipif(REHEARSAL, reason="tests/tools/test_demo.py does so on a CPU")
def test_twenty_training_steps_lower_the_loss(train, capfd):
    found = losses(train("run", "train.steps=20"))
    header = capfd.readouterr().out
    assert all(re.search(rf"^{part} +compiled: yes$", header, re.MULTILINE) for part in ("layers", "loss"))
    assert len(found) == 20
    assert found[-1] < found[0] - 0.5


def test_a_resumed_run_has_the_same_losses_however_its_states_are_kept(train, tmp_path):
    """Checkpoints are written in the foreground in one run, in the background in the other, which also keeps local
    copies and is stopped and resumed."""
    short = ("train.steps=6", "train.sequence_length=256", "deterministic=true")
    whole = train("whole", *short, "checkpoint.background=false", "checkpoint.every=2")
    copies = (
        *short,
        "checkpoint.every=4",
        "checkpoint.local_every=1",
        f"checkpoint.local_directory={tmp_path / 'copies'}",
    )
    train("parts", *copies, "--until", 3)
    parts = train("parts", *copies, "--resume")
    assert len(losses(whole)) == 6
    assert losses(parts) == losses(whole)


def test_a_classifier_is_evaluated_while_it_is_trained(tmp_path):
    """A Long Range Arena task: 2 evaluations, of loss and accuracy."""
    examples = tmp_path / "listops"
    bst(
        "lra",
        "prepare",
        "listops",
        "--to",
        examples,
        "train=64",
        "validation=16",
        "test=16",
        "min_length=8",
        "max_length=64",
    )
    bst(
        "train",
        "launch/recipes/lra/listops-short.yaml",
        f"data.examples={examples}",
        "train.steps=4",
        "schedule.warmup_steps=1",
        "evaluation.every=2",
        "--run-dir",
        tmp_path / "run",
    )
    assert len(losses(tmp_path / "run", "eval")) == 2
