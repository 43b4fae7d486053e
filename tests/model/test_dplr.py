"""S4-DPLR compared with HiPPO's definition, with a step recurrence, and with itself in slices."""

from __future__ import annotations

import math

import pytest
import torch

from bst_dist.model.config import DPLRConfig
from bst_dist.model.ssm.dplr import S4DPLR, hippo_legs, hippo_modes
from bst_dist.parallel.sequence.past import EarlierCall, Past

CONFIG = DPLRConfig(kernel="s4-dplr", state=6, chunk=8)
BLOCK = 16


def build(width=3, maps=2, own_dynamics=False, config=CONFIG):
    torch.manual_seed(0)
    model = S4DPLR(width, maps, config, own_dynamics).double()
    with torch.no_grad():  # breaks the symmetry of the initial values
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


@torch.no_grad()
def step_by_step(model, z, starts=None):
    """Return the output of the literal recurrence: A = diag(λ) - p p* on all 2n complex modes, bilinear, by token."""
    batch, length, width = z.shape
    maps, sets = len(model.read_out), len(model.log_dt)
    y = torch.zeros(batch, length, maps, width, dtype=torch.float64)
    for c in range(maps):
        f = c if sets > 1 else 0
        for d in range(width):
            dt = torch.exp(model.log_dt[f, d])
            lam = torch.complex(-torch.exp(model.log_decay[f, d]), model.frequency[f, d])
            p, b, read = (
                torch.view_as_complex(x) for x in (model.low_rank[f, d], model.into[f, d], model.read_out[c, d])
            )
            lam, p, b, read = (torch.cat((x, x.conj())) for x in (lam, p, b, read))
            a = torch.diag(lam) - torch.outer(p, p.conj())
            inverse = torch.linalg.inv(torch.eye(len(a)) - dt / 2 * a)
            a_bar, b_bar = inverse @ (torch.eye(len(a)) + dt / 2 * a), inverse @ b * dt
            for row in range(batch):
                x = torch.zeros(len(a), dtype=torch.complex128)
                for t in range(length):
                    if starts is not None and t % BLOCK == 0 and starts[row, t // BLOCK]:
                        x = torch.zeros_like(x)
                    x = a_bar @ x + b_bar * z[row, t, d]
                    y[row, t, c, d] = (read @ x).real + model.skip[c, d] * z[row, t, d]
    return y


def close(a, b, atol=1e-11):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def test_initial_modes_are_hippo_legs():
    """The impulse response of the modes is that of HiPPO-LegS: the same system in another basis."""
    a, b = hippo_legs(8)
    for n in range(8):
        for k in range(8):
            entry = -math.sqrt((2 * n + 1) * (2 * k + 1)) if n > k else -(n + 1) if n == k else 0
            assert a[n, k] == pytest.approx(entry)
    lam, p, into = (torch.cat((x, x.conj())) for x in hippo_modes(8))
    modes = torch.diag(lam) - torch.outer(p, p.conj())
    eigenvalues = torch.linalg.eigvals(modes).real.sort().values
    torch.testing.assert_close(eigenvalues, -torch.arange(8.0, 0, -1, dtype=torch.float64), rtol=0, atol=1e-6)
    for t in (0.1, 0.5, 2.0):  # read out with p*, which is known in both bases: (n + 1/2)^(1/2) in HiPPO's
        known = torch.sqrt(torch.arange(8, dtype=torch.float64) + 0.5) @ torch.linalg.matrix_exp(a * t) @ b
        close((p.conj() @ torch.linalg.matrix_exp(modes * t) @ into).real, known, 1e-10)


@pytest.mark.parametrize("length", [1, 2, 7, 32])
def test_cauchy_kernel_equals_the_powers_of_the_recurrence(length):
    model = build()
    a, b, read_out = model.recurrence()
    expected = torch.stack(
        [torch.einsum("cdi,dij,dj->cd", read_out, torch.linalg.matrix_power(a[0], k), b[0]) for k in range(length)], -1
    )
    close(model.kernel(length), expected)


@pytest.mark.parametrize("starts", [None, torch.tensor([[False, True], [True, False]])])
def test_forward_equals_the_step_recurrence(starts):
    model, z = build(), torch.randn(2, 2 * BLOCK, 3, dtype=torch.float64)
    close(model(z, Past(), starts), step_by_step(model, z, starts))


@pytest.mark.parametrize("own_dynamics", [False, True])
@pytest.mark.parametrize("starts", [None, torch.tensor([[False, True], [True, False]])])
def test_block_ends_equal_the_step_recurrence(own_dynamics, starts):
    model, z = build(own_dynamics=own_dynamics), torch.randn(2, 2 * BLOCK, 3, dtype=torch.float64)
    expected = step_by_step(model, z, starts)[:, BLOCK - 1 :: BLOCK]
    close(model.block_ends(z, BLOCK, Past(), starts), expected)


@pytest.mark.parametrize("sizes", [[BLOCK, BLOCK], [5, 3, 8, BLOCK], [1] * 2 * BLOCK])
def test_slices_equal_the_whole(sizes):
    model, z = build(), torch.randn(2, 2 * BLOCK, 3, dtype=torch.float64)
    state, position, outputs, ends = {}, 0, [], []
    for part in z.split(sizes, dim=1):
        past, other = EarlierCall(state, position), EarlierCall(state, position)
        outputs.append(model(part, past))
        ends.append(model.block_ends(part, BLOCK, other))
        close(past.after["ssm"], other.after["ssm"])
        state, position = past.after, position + part.shape[1]
    close(torch.cat(outputs, 1), model(z, Past()))
    close(torch.cat(ends, 1), model.block_ends(z, BLOCK, Past()))


def test_later_tokens_have_no_effect_bitwise():
    model, z = build(), torch.randn(1, 2 * BLOCK, 3, dtype=torch.float64)
    changed = z.clone()
    changed[:, 11:] = torch.randn_like(changed[:, 11:])
    assert torch.equal(model(z, Past())[:, :11], model(changed, Past())[:, :11])


@pytest.mark.parametrize("own_dynamics", [False, True])
def test_gradients_pass_gradcheck(own_dynamics):
    model = build(2, 2, own_dynamics, CONFIG.model_copy(update={"state": 4, "chunk": 2}))
    z = torch.randn(1, 4, 2, dtype=torch.float64, requires_grad=True)
    run = (lambda *_: model.block_ends(z, 4, Past())) if own_dynamics else (lambda *_: model(z, Past()))
    assert torch.autograd.gradcheck(run, (z, *model.parameters()))
