"""TF32 for the SSM's products: torch's flag, which also exists on a CPU, while a run trains and after it."""

from types import SimpleNamespace

import pytest
import torch

from bst_dist.train import run


class _Here(Exception):
    """Raised to stop a run once it has begun."""


@pytest.fixture(params=[False, True], ids=["off before", "on before"])
def before(request):
    found = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = request.param
    yield request.param
    torch.backends.cuda.matmul.allow_tf32 = found


def while_training(monkeypatch, precision: str) -> bool:
    """Return the flag's value in a run of that precision; the run is stopped at its start."""
    found = []

    def begin(*_):
        found.append(torch.backends.cuda.matmul.allow_tf32)
        raise _Here

    recipe = SimpleNamespace(deterministic=False, train=SimpleNamespace(precision=precision))
    monkeypatch.setattr(run, "load", lambda request: recipe)
    monkeypatch.setattr(run, "resolve_together", begin)
    with pytest.raises(_Here):
        run.train(SimpleNamespace(), SimpleNamespace(world=1))
    return found[0]


def test_tf32_is_enabled_in_a_bf16_run_and_restored_afterwards(before, monkeypatch):
    assert while_training(monkeypatch, "bf16") is True
    assert torch.backends.cuda.matmul.allow_tf32 is before


def test_tf32_is_not_changed_by_an_fp32_run(before, monkeypatch):
    assert while_training(monkeypatch, "fp32") is before
    assert torch.backends.cuda.matmul.allow_tf32 is before
