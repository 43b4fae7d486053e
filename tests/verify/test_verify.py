"""`bst verify` as a user starts it: it passes correct code, and names parameters that were broken on purpose."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from bst_dist.cli import main
from bst_dist.cluster.processes import HostRanks
from bst_dist.cluster.verdict import Ended
from bst_dist.verify import command

pytestmark = pytest.mark.ranks

RECIPE = """
name: small
model: {width: 64, heads: 4, ffn: 256, block: 32, depth: 6, mixer: bst, placement: [1, 4], context: {variant: SH}}
data: {corpus: nowhere}
train: {steps: 10, sequence_length: 256, sequences: 8, precision: fp32}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``broken(source)`` runs `source` in every rank before it begins."""

    def break_(source: str) -> None:
        program = tmp_path / "broken.py"
        run = "import sys\nfrom pathlib import Path\nfrom bst_dist.verify.__main__ import main\n"
        program.write_text(dedent(source) + run + "main(Path(sys.argv[1]), Path(sys.argv[2]))\n")
        monkeypatch.setattr(command, "PROGRAM", (sys.executable, str(program)))

    return break_


def certificate(recipe: Path, *options: str) -> tuple[int, dict[str, Any]]:
    path = recipe.with_name("report.json")
    status = main(["verify", str(recipe), *options, "--json", str(path)])
    return status, json.loads(path.read_text())


def test_a_signal_is_answered_in_the_name_of_this_command(recipe, monkeypatch, capsys):
    """Nothing is saved here, unlike in `bst train`."""
    said: list[str] = []

    def launch(program: list[str], share: HostRanks, notice: str) -> Ended:
        said.append(notice.format("SIGTERM"))
        return Ended(1, {0: -15})

    monkeypatch.setattr(command, "launch", launch)
    assert main(["verify", str(recipe)]) == 2
    assert said == ["bst verify: told to stop (SIGTERM): the ranks end without a verdict"]


def test_every_combination_of_a_grid_passes_without_a_corpus(recipe, capfd):
    grid = ["--zero", "0", "3", "--sp", "1", "2", "--checkpointing", "selective", "--precision", "fp32", "bf16"]
    status, report = certificate(recipe, *grid, "--variants", "MF", "--accumulation", "2")
    assert status == 0
    assert report["passed"]
    assert len(report["combinations"]) == 2**3
    assert capfd.readouterr().out.count("PASS ") == 2**3
    assert {line["accumulation"] for line in report["combinations"]} == {2}
    for line in report["combinations"]:
        assert line["error"] < {"fp32": 1e-5, "bf16": 0.25}[line["precision"]]


def test_sequences_in_slices_are_verified_against_whole_ones(recipe):
    """Also with edges on disk, and with slices shared by the ranks of a sequence."""
    grid = ["train.slice_tokens=64", "train.edges=disk", "--slices", "1", "4", "--sp", "1", "2", "--zero", "1"]
    status, report = certificate(recipe, *grid, "--variants", "MF")
    assert status == 0
    assert [line["slices"] for line in report["combinations"]] == [1, 4, 1, 4]


@pytest.mark.parametrize("documents", ["isolated", "masked"])
def test_a_carried_past_and_separate_documents_are_verified(recipe, tmp_path, documents):
    streaming = ["train.carry=true", "data.mode=streaming", f"data.documents={documents}"]
    options = ["--sp", "1", "2", "--checkpointing", "every-kth-layer", "offload", "--zero", "2"]
    status, report = certificate(recipe, *streaming, *options, "--run-dir", str(tmp_path / "run"))
    assert status == 0
    assert report["recipe"]["train"]["carry"]
    assert json.loads((tmp_path / "run" / command.FILE).read_text())["combinations"] == report["combinations"]


def test_a_gradient_summed_over_the_ranks_of_a_sequence_fails_even_in_bf16(recipe, broken, capfd):
    broken("""
        from bst_dist.train.engine import Engine
        from bst_dist.verify import certificate
        right, distributed_step = Engine.accumulate, certificate.distributed_step
        def summed(recipe, ranks, group):
            Engine.accumulate = lambda self, loss, last: right(self, loss * recipe.parallel.sp, last)
            return distributed_step(recipe, ranks, group)
        certificate.distributed_step = summed
    """)
    status, report = certificate(recipe, "--sp", "1", "4", "--zero", "2", "--precision", "fp32", "bf16")
    assert status == 1
    assert [line["passed"] for line in report["combinations"]] == [True, False, True, False]
    assert "4 times what it should be = sp" in report["combinations"][1]["cause"]
    said = capfd.readouterr().err
    assert "was the sequence-parallel group given to DeepSpeed?" in said
    assert "every failure has sp 4, and nothing that passed has" in said


def test_a_gradient_lost_between_slices_fails_and_names_where(recipe, broken, capfd):
    broken("""
        from bst_dist.parallel.sequence import neighbour
        right = neighbour._Extend.backward
        def lost(ctx, gradient, around):
            own, *rest = right(ctx, gradient, around)
            return own[:, :] * 0 + gradient[:, gradient.shape[1] - own.shape[1]:], *rest
        neighbour._Extend.backward = staticmethod(lost)
    """)
    status, report = certificate(recipe, "--sp", "2", "--zero", "1")
    assert status == 1
    (line,) = report["combinations"]
    assert "nearest to the loss is layers.3.mixer.attention.qkv.weight" in line["cause"]
    assert "check the communication" in line["cause"]
    assert "FAIL" in capfd.readouterr().out
