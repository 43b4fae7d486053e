"""S4D in chunks compared with a step recurrence and with a full-length FFT, in double precision."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bst_dist.model.config import SSMConfig
from bst_dist.model.ssm.pairs import Pair
from bst_dist.model.ssm.s4d import S4D, initial_frequencies
from bst_dist.parallel.sequence.past import EarlierCall, Past

NOTHING = Past()


def make(width=3, maps=1, own=False, chunk=8, state=6, init="lin") -> S4D:
    torch.manual_seed(0)
    return S4D(width, maps, SSMConfig(state=state, chunk=chunk, init=init, dt_min=0.01, dt_max=0.5), own).double()


def step_by_step(ssm: S4D, z: torch.Tensor) -> torch.Tensor:
    """Return x_t = Ā x_{t-1} + B̄ z_t, y_t = 2 Re(C x_t) + d z_t by token: (B, L, Ds) -> (B, L, C, Ds)."""
    a = torch.complex(-ssm.log_decay.exp(), ssm.frequency)
    a_bar = torch.exp(ssm.log_dt.exp().unsqueeze(-1) * a)
    b_bar = (a_bar - 1) / a
    c = torch.view_as_complex(ssm.read_out)
    x = torch.zeros(len(z), *a.shape, dtype=torch.complex128)
    outputs = []
    for t in range(z.shape[1]):
        x = a_bar * x + b_bar * z[:, t, None, :, None]
        outputs.append(2 * (c * x).sum(-1).real + ssm.skip * z[:, t, None])
    return torch.stack(outputs, dim=1)


def by_fft(ssm: S4D, z: torch.Tensor) -> torch.Tensor:
    """Convolution with the full-length kernel: (B, L, Ds) -> (B, L, C, Ds)."""
    length = z.shape[1]
    spectrum = torch.fft.rfft(ssm.kernel(length), n=2 * length) * torch.fft.rfft(z.mT, n=2 * length).unsqueeze(1)
    y = torch.fft.irfft(spectrum, n=2 * length)[..., :length]
    return y.permute(0, 3, 1, 2) + ssm.skip * z.unsqueeze(2)


@pytest.mark.parametrize("init", ["lin", "inv", "legs"])
@pytest.mark.parametrize("maps", [1, 3])
def test_chunks_equal_the_recurrence_and_the_fft(init, maps):
    ssm = make(maps=maps, init=init)
    z = torch.randn(2, 40, 3, dtype=torch.float64)
    y = ssm(z, NOTHING)
    torch.testing.assert_close(y, step_by_step(ssm, z), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(y, by_fft(ssm, z), rtol=1e-12, atol=1e-13)


def test_gradients_equal_those_of_the_recurrence():
    ssm = make(maps=2)
    z = torch.randn(2, 32, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 32, 2, 3, dtype=torch.float64)
    inputs = [z, *ssm.parameters()]
    ours = torch.autograd.grad((ssm(z, NOTHING) * weight).sum(), inputs)
    theirs = torch.autograd.grad((step_by_step(ssm, z) * weight).sum(), inputs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from([8, 16, 24]), min_size=1, max_size=4), st.integers(0, 7))
def test_any_slicing_equals_one_call(slices, rest):
    """Slices of whole chunks, then a remainder shorter than a chunk; each continues from the state of the previous."""
    ssm = make(maps=2)
    lengths = [*slices, *([rest] if rest else [])]
    z = torch.randn(2, sum(lengths), 3, dtype=torch.float64)
    state, outputs = None, []
    for part in z.split(lengths, dim=1):
        past = EarlierCall(state)
        outputs.append(ssm(part, past))
        state = past.after
    torch.testing.assert_close(torch.cat(outputs, 1), step_by_step(ssm, z), rtol=1e-12, atol=1e-13)


def test_the_chunked_form_is_causal_exactly():
    ssm = make().float()
    z = torch.randn(1, 64, 3, requires_grad=True)
    for t in (0, 7, 8, 30):
        (gradient,) = torch.autograd.grad(ssm(z, NOTHING)[0, t].sum(), z)
        assert gradient[0, t + 1 :].abs().max() == 0
        assert gradient[0, t].abs().min() > 0


def test_a_document_start_resets_the_state():
    ssm = make()
    z = torch.randn(2, 64, 3, dtype=torch.float64)
    starts = torch.tensor([[False, True, False, False], [True, False, True, True]])  # blocks of 16
    y = ssm(z, NOTHING, starts)
    for row, begins in ((0, [0, 16, 64]), (1, [0, 32, 48, 64])):
        for begin, end in pairwise(begins):
            alone = ssm(z[row : row + 1, begin:end], NOTHING)
            torch.testing.assert_close(y[row : row + 1, begin:end], alone, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("chunk", [4, 8, 16])
def test_block_ends_equal_full_convolutions_of_every_filter(chunk):
    ssm = make(maps=5, own=True, chunk=chunk)
    z = torch.randn(2, 64, 3, dtype=torch.float64)
    torch.testing.assert_close(ssm.block_ends(z, 16, NOTHING), by_fft(ssm, z)[:, 15::16], rtol=1e-12, atol=1e-13)


def test_block_ends_of_slices_equal_one_call():
    ssm = make(maps=5, own=True, chunk=4)
    z = torch.randn(2, 80, 3, dtype=torch.float64)
    whole = ssm.block_ends(z, 16, NOTHING)
    state, position, found = None, 0, []
    for length in (32, 8, 4, 1, 1, 2, 6, 7, 3, 16):
        past = EarlierCall(state, position)
        found.append(ssm.block_ends(z[:, position : position + length], 16, past))
        state, position = past.after, position + length
    assert [part.shape[1] for part in found] == [2, 0, 0, 0, 0, 1, 0, 0, 1, 1]
    torch.testing.assert_close(torch.cat(found, 1), whole, rtol=1e-12, atol=1e-13)


def test_single_precision_keeps_the_phase_over_65536_tokens():
    ssm = make(state=16, chunk=64)
    with torch.no_grad():
        ssm.log_decay.fill_(math.log(1e-4))  # almost no decay, so that distant tokens still matter
    z = torch.zeros(1, 65536, 3)
    z[0, 0] = 1
    exact = ssm(z.double(), NOTHING)
    error = (ssm.float()(z, NOTHING) - exact).abs().max() / exact.abs().max()
    assert error < 1e-5


def test_dynamics_stay_in_single_precision_under_autocast():
    ssm = make().float()
    z = torch.randn(1, 32, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ssm(z, NOTHING)
    torch.testing.assert_close(y, ssm(z, NOTHING), rtol=0, atol=0)


@pytest.mark.parametrize("length", [9, 12, 15])
def test_a_length_between_chunks_is_one_chunk(length):
    ssm, z = make(), torch.randn(1, length, 3, dtype=torch.float64)
    torch.testing.assert_close(ssm(z, NOTHING), step_by_step(ssm, z), rtol=1e-12, atol=1e-13)


def test_legs_frequencies_are_those_of_the_normal_part_of_hippo():
    """HiPPO-LegS A = -(1/2 + skew part) - rank one (arXiv 2111.00396, appendix): A + P P^T has real parts -1/2."""
    n = 8
    hippo = torch.zeros(n, n, dtype=torch.float64)
    for i in range(n):
        for j in range(n):
            if i > j:
                hippo[i, j] = -math.sqrt((2 * i + 1) * (2 * j + 1))
            elif i == j:
                hippo[i, j] = -(i + 1)
    p = torch.sqrt(torch.arange(n, dtype=torch.float64) + 0.5)
    eigenvalues = torch.linalg.eigvals(hippo + torch.outer(p, p))
    assert torch.allclose(eigenvalues.real, torch.full((n,), -0.5, dtype=torch.float64))
    expected = eigenvalues.imag.sort().values[n // 2 :]
    torch.testing.assert_close(initial_frequencies("legs", n // 2).sort().values, expected)


def test_parameters_at_odd_offsets_of_a_flat_buffer_work():
    """ZeRO may place parameters there. A complex view of real pairs would need an even offset."""
    ssm = make(maps=2).float()
    z = torch.randn(1, 16, 3)
    expected = ssm(z, NOTHING)
    for parameter in ssm.parameters():
        flat = torch.cat((torch.zeros(1), parameter.detach().flatten()))
        parameter.data = flat[1:].view(parameter.shape)
    torch.testing.assert_close(ssm(z, NOTHING), expected, rtol=0, atol=0)


def test_lin_and_inv_frequencies_are_those_of_their_equations():
    """arXiv 2206.11893: A_n = -1/2 + i pi n (9), and -1/2 + i N/pi (N/(2n + 1) - 1) with N states (8)."""
    assert initial_frequencies("lin", 3).tolist() == pytest.approx([0, math.pi, 2 * math.pi])
    assert initial_frequencies("inv", 3).tolist() == pytest.approx([6 / math.pi * (6 / odd - 1) for odd in (1, 3, 5)])


def test_channels_may_share_their_modes():
    config = SSMConfig(state=6, chunk=8)
    assert S4D(4, 2, config).log_decay.shape == (1, 4, 3)
    shared = S4D(4, 2, config, shared_modes=True)
    assert shared.log_decay.shape == shared.frequency.shape == (1, 1, 3)
    assert shared.log_dt.shape == (1, 4)  # each channel has its own step size
    assert S4D(4, 2, config, own_dynamics=True).log_decay.shape == (2, 4, 3)


def test_powers_and_their_gradients_in_single_precision_are_near_those_in_double():
    """`power` is its own gradient; here autograd differentiates torch's complex exponential."""
    torch.manual_seed(0)
    log_a = torch.complex(-torch.rand(5).double() / 1000, 3 * torch.rand(5).double()).requires_grad_()
    exponents = torch.arange(0, 4096, 7).unsqueeze(-1)
    weights = torch.randn(2, len(exponents), 5)
    wanted = torch.exp(log_a * exponents)
    (gradient,) = torch.autograd.grad((wanted.real * weights[0] + wanted.imag * weights[1]).sum(), log_a)
    parts = Pair(*(part.detach().clone().requires_grad_() for part in (log_a.real, log_a.imag)))
    power = parts.power(exponents, torch.float32)
    found = torch.autograd.grad((power.real * weights[0] + power.imag * weights[1]).sum(), parts)
    assert power.real.dtype == torch.float32
    torch.testing.assert_close(power.joined(), wanted.to(torch.complex64))
    torch.testing.assert_close(torch.complex(*found), gradient, rtol=1e-6, atol=1e-3)
