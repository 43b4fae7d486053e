"""The evaluation of a classifier while it is trained, with the meta device in a GPU's place."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch

from bst_dist.parallel.phases import Phases
from bst_dist.study.lra.loader import Labelled
from bst_dist.study.lra.model import Classified
from bst_dist.study.lra.objective import EvaluateAccuracy
from bst_dist.train.config import EvaluationConfig


def test_what_is_added_up_lies_where_the_model_computes():
    """On a GPU torch adds a tensor in the host's memory to none of its own; nor does it on the meta device."""
    ids = np.zeros((2, 4), np.int64)
    batch = Labelled(ids, ids[:, 0], np.ones(2, bool), np.arange(2))
    device, seen = torch.device("meta"), []

    def forward(**inputs: torch.Tensor) -> Classified:
        seen.append(inputs["labels"].device)
        return Classified(torch.zeros((), device=device), torch.zeros(2, device=device),
                          torch.zeros(2, dtype=torch.bool, device=device))  # fmt: skip

    engine = SimpleNamespace(module=torch.nn.Identity(), forward=forward)
    ranks = SimpleNamespace(device=device, phases=Phases())
    # Told to stop at the end: nothing is read then, which would be an error here.
    stop = SimpleNamespace(poll=lambda: False, agreed=True)
    evaluate = EvaluateAccuracy(EvaluationConfig(), [batch], engine, ranks, torch.zeros(2), [], 1, stop)
    assert evaluate.evaluate(1) is None
    assert seen == [device]
