"""A run started by an older version of this program can be resumed by this version.

`data/format-2` was made by commit 75eb99c. It holds a corpus, a run of two ranks that was stopped after step 4 of 6
(ZeRO-1, streaming, the past carried), and the reports of the same run without a stop. Its recipe has all settings of
that version, and its checkpoint their digest. Settings added since then must not make it a different run.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bst_base.json_lines import read_lines
from bst_dist.checkpoint.directory import directory, load_weights
from bst_dist.report.metrics import FILE

DATA = Path(__file__).parent / "data" / "format-2"


@pytest.mark.ranks
@pytest.mark.parametrize("ranks", [2, 1])
def test_a_run_of_an_older_version_can_be_resumed(bst, older, ranks):
    done = bst("train", "run/recipe.yaml", "--resume", "--ranks", ranks, "--run-dir", "run")
    assert done.returncode == 0, done.stdout
    assert "resumed from step 4" in done.stdout
    expected = [json.loads(line) for line in (DATA / "expected.jsonl").read_text().splitlines()]
    found = {(line["kind"], line["step"]): line for line in read_lines(older / FILE)}
    for line in expected:
        one = found[line["kind"], line["step"]]
        assert one["tokens"] == line["tokens"]
        assert one["loss_nats"] == pytest.approx(line["loss_nats"], rel=1e-4)


def test_weights_of_an_older_checkpoint_are_read(older):
    weights = load_weights(directory(older, 4))
    stored = [load_file(path) for path in directory(older, 4).glob("weights-*")]
    assert len(stored) == 2
    for name, tensor in weights.items():
        there = torch.cat([shard[name].flatten() for shard in stored if name in shard])
        assert torch.equal(tensor.flatten().sort().values, there.sort().values)
