"""The BST layer compared with a literal transcription of its equations: loops over tokens and heads, no shared code."""

import pytest
import torch
from pydantic import ValidationError

from bst_dist.model.config import ContextConfig, LayerConfig
from bst_dist.model.layers import BSTMixer
from bst_dist.parallel.sequence.past import Past

WIDTH, HEADS, BLOCK, LENGTH = 16, 2, 8, 24


def make(variant: str, attend: str = "current") -> BSTMixer:
    torch.manual_seed(1)
    config = LayerConfig(
        width=WIDTH,
        heads=HEADS,
        ffn=32,
        block=BLOCK,
        attention={"max_distance": 12, "buckets": 8},
        context=ContextConfig(variant=variant, states=3, attend=attend),
        ssm={"state": 4, "chunk": 4},
    )
    mixer = BSTMixer(config).double()
    for parameter in mixer.parameters():  # no parameter at 0 or 1, which could hide a wrong term
        if parameter.dim() <= 2:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return mixer


def normalised(x):
    return x / x.norm()


def ssm_outputs(ssm, z):
    """Return y[t][c] (Ds,) of one row by the step recurrence."""
    a = torch.complex(-ssm.log_decay.exp(), ssm.frequency)
    a_bar = torch.exp(ssm.log_dt.exp().unsqueeze(-1) * a)
    b_bar = (a_bar - 1) / a
    c = torch.view_as_complex(ssm.read_out)
    x = torch.zeros(a.shape, dtype=torch.complex128)
    outputs = []
    for token in z:
        x = a_bar * x + b_bar * token.unsqueeze(-1)
        outputs.append(
            [2 * (c[i] * x[i if len(x) > 1 else 0]).sum(-1).real + ssm.skip[i] * token for i in range(len(c))]
        )
    return outputs


def keys_and_values(mixer, variant, y, head):
    """Return a function from a context state to its (key, value) for one head."""
    context, dh = mixer.cross.context, WIDTH // HEADS
    if variant == "MF":
        weight = context.key_value.weight
        k_weight, v_weight = weight[head * dh : (head + 1) * dh], weight[WIDTH + head * dh : WIDTH + (head + 1) * dh]
        return lambda state: (normalised(k_weight @ state), v_weight @ state)
    return lambda state: (normalised(state @ context.key_value[head][:, :dh]), state @ context.key_value[head][:, dh:])


def context_of(mixer, variant, attend, y, t, head):
    """Return the context states that token t attends to."""
    block = t // BLOCK
    if variant == "MF":
        context = mixer.cross.context
        ends = context.initial if block == 0 else torch.stack(y[block * BLOCK - 1])
        return list(ends + context.identity)
    stream = head if variant == "MH" else 0
    places = range(block * BLOCK, t + 1) if attend == "current" else range((block - 1) * BLOCK, block * BLOCK)
    return [y[j][stream] for j in places if j >= 0]


def literal(mixer, variant, attend, u):
    """Return the output of one row, token by token and head by head."""
    dh = WIDTH // HEADS
    own = mixer.attention
    qkv = [(own.qkv.weight @ token).view(3, HEADS, dh) for token in u]
    bias = own.by_distance(BLOCK + 1, Past())
    y = ssm_outputs(mixer.cross.context.ssm, [mixer.down.weight @ token for token in u])
    outputs = []
    for t in range(len(u)):
        heads = []
        for h in range(HEADS):
            q = normalised(qkv[t][0, h]) * own.scale[h]
            seen = range(max(0, t - BLOCK + 1), t + 1)
            scores = torch.stack([q @ normalised(qkv[j][1, h]) + bias[h, t - j] for j in seen])
            heads.append(sum(p * qkv[j][2, h] for p, j in zip(torch.softmax(scores, 0), seen, strict=True)))
        for h in range(HEADS):
            states = context_of(mixer, variant, attend, y, t, h)
            if not states:
                heads.append(torch.zeros(dh, dtype=u.dtype))
                continue
            q = normalised((mixer.cross.query.weight @ u[t]).view(HEADS, dh)[h]) * mixer.cross.scale[h]
            pairs = [keys_and_values(mixer, variant, y, h)(state) for state in states]
            scores = torch.stack([q @ k for k, _ in pairs])
            heads.append(sum(p * v for p, (_, v) in zip(torch.softmax(scores, 0), pairs, strict=True)))
        outputs.append(mixer.out.weight @ torch.cat(heads))
    return torch.stack(outputs)


CASES = [("SH", "current"), ("MH", "current"), ("MF", "current"), ("SH", "previous"), ("MH", "previous")]


@pytest.mark.parametrize(("variant", "attend"), CASES)
def test_layer_equals_its_equations(variant, attend):
    mixer = make(variant, attend)
    u = torch.randn(2, LENGTH, WIDTH, dtype=torch.float64)
    ours = mixer(u, Past(), None)
    for row in range(2):
        torch.testing.assert_close(ours[row], literal(mixer, variant, attend, u[row]), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(("variant", "attend"), CASES)
def test_gradients_equal_those_of_the_equations(variant, attend):
    mixer = make(variant, attend)
    u = torch.randn(1, LENGTH, WIDTH, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(1, LENGTH, WIDTH, dtype=torch.float64)
    inputs = [u, *mixer.parameters()]
    ours = torch.autograd.grad((mixer(u, Past(), None) * weight).sum(), inputs)
    theirs = torch.autograd.grad((literal(mixer, variant, attend, u[0]) * weight[0]).sum(), inputs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


def test_attending_previous_states_is_refused_for_mf():
    with pytest.raises(ValidationError, match="previous"):
        ContextConfig(variant="MF", attend="previous")
