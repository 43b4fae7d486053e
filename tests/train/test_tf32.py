"""TF32 for the SSM's products: the flag, which torch has on a CPU as well, while a run trains and after it."""

from types import SimpleNamespace

import pytest
import torch

from bst_dist.train import run


class _Here(Exception):
    """A run has begun."""


@pytest.fixture(params=[False, True], ids=["off before", "on before"])
def before(request):
    found = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = request.param
    yield request.param
    torch.backends.cuda.matmul.allow_tf32 = found


def while_training(monkeypatch, precision: str) -> bool:
    """The flag as a run of that precision finds it, which then fails."""
    found = []

    def begin(*_):
        found.append(torch.backends.cuda.matmul.allow_tf32)
        raise _Here

    recipe = SimpleNamespace(deterministic=False, train=SimpleNamespace(precision=precision))
    monkeypatch.setattr(run, "load", lambda request: recipe)
    monkeypatch.setattr(run, "resolve", begin)
    with pytest.raises(_Here):
        run.train(SimpleNamespace(), SimpleNamespace(world=1))
    return found[0]


def test_a_run_in_bf16_has_it_and_leaves_it_as_it_was(before, monkeypatch):
    assert while_training(monkeypatch, "bf16") is True
    assert torch.backends.cuda.matmul.allow_tf32 is before


def test_a_run_in_fp32_leaves_it_alone(before, monkeypatch):
    assert while_training(monkeypatch, "fp32") is before
    assert torch.backends.cuda.matmul.allow_tf32 is before
