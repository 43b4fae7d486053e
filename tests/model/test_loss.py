"""The tiled loss compared with torch's cross-entropy."""

from contextlib import nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from bst_dist.model import loss
from bst_dist.model.loss import linear_cross_entropy
from bst_dist.plan.memory.live import computes


@pytest.fixture(params=[1, 3, 10_000], ids=lambda rows: f"tiles of {rows}")
def _tiles(request, monkeypatch):
    monkeypatch.setattr(loss, "TILE_LOGITS", 11 * request.param)


def inputs(dtype=torch.float64):
    torch.manual_seed(0)
    hidden = torch.randn(2, 5, 4, dtype=dtype, requires_grad=True)
    weight = torch.randn(11, 4, dtype=dtype, requires_grad=True)
    return hidden, weight, torch.randint(0, 11, (2, 5)), torch.rand(2, 5) < 0.7


@pytest.mark.usefixtures("_tiles")
def test_loss_and_gradients_equal_cross_entropy():
    hidden, weight, labels, mask = inputs()
    total, per_token, *_ = linear_cross_entropy(hidden, weight, labels, mask, 0.5)
    expected = F.cross_entropy((0.5 * hidden @ weight.T).flatten(0, 1), labels.flatten(), reduction="none")
    expected = expected.view(2, 5) * mask
    torch.testing.assert_close(per_token, expected)
    ours = torch.autograd.grad(3 * total, (hidden, weight))
    for one, other in zip(ours, torch.autograd.grad(3 * expected.sum(), (hidden, weight)), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.usefixtures("_tiles")
def test_loss_gradients_pass_gradcheck():
    hidden, weight, labels, mask = inputs()
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, labels, mask, 0.5)[0], (hidden, weight))


def test_logits_are_single_precision_under_autocast():
    hidden, weight, labels, mask = inputs(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, per_token, *_ = linear_cross_entropy(hidden, weight, labels, mask, 1.0)
    assert total.dtype == per_token.dtype == torch.float32
    exact = linear_cross_entropy(hidden, weight, labels, mask, 1.0)[0]
    assert (total - exact).abs() / exact < 0.02
    expected = F.cross_entropy((hidden @ weight.T).flatten(0, 1), labels.flatten(), reduction="none").view(2, 5)
    torch.testing.assert_close(exact, (expected * mask).sum())  # does not use autocast itself


def test_the_loss_under_no_grad_requires_no_gradient():
    hidden, weight, labels, mask = inputs()
    with torch.no_grad():
        total, *_ = linear_cross_entropy(hidden, weight, labels, mask, 0.5)
    assert not total.requires_grad


@pytest.mark.usefixtures("_tiles")
def test_correct_predictions_are_unmasked_labels_with_the_highest_logit():
    hidden, weight, labels, mask = inputs()
    best = (hidden @ weight.T).argmax(-1)
    labels = torch.where(torch.rand(2, 5) < 0.5, best, labels)
    with torch.no_grad():
        correct = linear_cross_entropy(hidden, weight, labels, mask, 0.5)[2]
    assert correct.tolist() == ((best == labels) & mask).tolist()
    assert correct.any()
    assert linear_cross_entropy(hidden, weight, labels, mask, 0.5)[2] is None  # not computed in training


@pytest.mark.usefixtures("_tiles")
def test_the_z_loss_and_its_gradient_equal_the_formula():
    """The gradient of nll + z log^2 Z with respect to the logits is (1 + 2 z log Z) softmax - onehot."""
    hidden, weight, labels, mask = inputs()
    total, per_token, _, squares = linear_cross_entropy(hidden, weight, labels, mask, 0.5, z_loss=0.3)
    with torch.no_grad():
        logits = 0.5 * (hidden @ weight.T)
        exponentials = logits.exp()
        log_z = exponentials.sum(-1, keepdim=True).log()
        nats = ((log_z - logits.gather(-1, labels.unsqueeze(-1))).squeeze(-1) * mask).sum()
        expected = (log_z.squeeze(-1) ** 2 * mask).sum()
        onehot = F.one_hot(labels, 11)
        d_logits = ((1 + 0.6 * log_z) * exponentials / log_z.exp() - onehot) * mask.unsqueeze(-1) * 0.5
    torch.testing.assert_close(squares, expected)
    torch.testing.assert_close(per_token.sum(), nats)
    torch.testing.assert_close(total, nats + 0.3 * expected)
    d_hidden, d_weight = torch.autograd.grad(total, (hidden, weight))
    torch.testing.assert_close(d_hidden, d_logits @ weight)
    torch.testing.assert_close(d_weight, d_logits.flatten(0, 1).T @ hidden.flatten(0, 1))
    assert not squares.requires_grad


def test_without_gradient_the_z_loss_is_left_out():
    with torch.no_grad():
        plain, z = (linear_cross_entropy(*inputs(), 0.5, z_loss=z) for z in (0.0, 0.3))
    assert torch.equal(plain[0], z[0])
    assert z[3] is None


class Traffic(TorchDispatchMode):
    """Counts kernel launches, and the bytes that they read and write."""

    def __init__(self):
        super().__init__()
        self.launches = self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if computes(func):
            self.launches += 1
            self.bytes += sum(x.nbytes for x in tree_iter((args, kwargs, out)) if isinstance(x, torch.Tensor))
        return out


@pytest.mark.parametrize(("device", "launches", "traffic_gb"), [("cpu", 2150, 164), ("meta", 144, 71)])
def test_launches_and_traffic_of_32k_tokens_by_device(device, launches, traffic_gb, monkeypatch):
    """Only a CPU uses the small CPU tiles. Counted on tensors without storage, in fp32, D 1024, V 32,000."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # a meta device has no autocast
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    with FakeTensorMode() if device == "cpu" else nullcontext(), Traffic() as counted:
        hidden, weight = (torch.empty(n, 1024, device=device, requires_grad=True) for n in (32_768, 32_000))
        labels, mask = (torch.empty(1, 32_768, dtype=kind, device=device) for kind in (torch.long, torch.bool))
        linear_cross_entropy(hidden.unsqueeze(0), weight, labels, mask, 1.0)[0].backward()
    assert counted.launches == pytest.approx(launches, rel=0.1)
    assert counted.bytes / 1e9 == pytest.approx(traffic_gb, rel=0.1)
