"""Evaluation of a classifier during training, with the meta device instead of a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bst_dist.cli import main
from bst_dist.parallel.phases import Phases
from bst_dist.study.lra.loader import Labelled
from bst_dist.study.lra.model import Classified
from bst_dist.study.lra.objective import AccuracyEvaluation
from bst_dist.train.context import Context


def test_evaluation_sums_are_on_the_device_of_the_model():
    """torch cannot add a CPU tensor to a GPU tensor; the meta device has the same restriction."""
    ids = np.zeros((2, 4), np.int64)
    batch = Labelled(ids, ids[:, 0], np.ones(2, bool), np.arange(2))
    device, seen = torch.device("meta"), []

    def forward(**inputs: torch.Tensor) -> Classified:
        seen.append(inputs["labels"].device)
        return Classified(
            torch.zeros((), device=device),
            torch.zeros(2, device=device),
            torch.zeros(2, dtype=torch.bool, device=device),
        )

    engine = SimpleNamespace(module=torch.nn.Identity(), forward=forward)
    ranks = SimpleNamespace(device=device, phases=Phases())
    # Stop at the end, so that no value is read; on the meta device this would be an error.
    stop = SimpleNamespace(poll=lambda: False, stopping=True)
    evaluation = AccuracyEvaluation(Context(engine, ranks, torch.zeros(2), stop), [batch])
    assert evaluation.evaluate(1) is None
    assert seen == [device]


@pytest.mark.parametrize("rows", ["0", "-3"])
def test_fewer_than_one_example_at_a_time_are_refused(tmp_path, capsys, rows):
    with pytest.raises(SystemExit):
        main(["lra", "eval", str(tmp_path), "--rows", rows])
    assert f"argument --rows: {rows} is less than 1" in capsys.readouterr().err
