"""Each baseline's mixer compared with a slow, literal transcription of its equations (token loops, no shared code)."""

from __future__ import annotations

import math

import pytest
import torch

from bst_base.settings import parse
from bst_dist.model.config import LayerConfig
from bst_dist.model.layers import MIXERS
from bst_dist.parallel.sequence.past import EarlierCall, Past

WIDTH, HEADS, BLOCK, LENGTH = 8, 2, 4, 20
HEAD = WIDTH // HEADS
SETTINGS = {
    "transformer-xl": {"transformer_xl": {"window": 8}},
    "block-recurrent": {"block_recurrent": {"states": 3}},
    "gss": {"gss": {"gate": 2, "reduce": 2}, "ssm": {"state": 4, "chunk": 2}},
    "ssm": {"ssm": {"state": 4, "chunk": 2}},
    "mamba2": {"mamba2": {"state": 3, "head": 4, "chunk": 2}},
    "gated-deltanet": {"gated_deltanet": {"chunk": 2}},
    "full": {"full": {"longest": LENGTH}},
    "bst-no-cross": {},
    **{
        f"bst-joint {variant}": {"context": {"variant": variant, "states": 3}, "ssm": {"state": 4, "chunk": 2}}
        for variant in ("SH", "MH", "MF")
    },
}
NO_STARTS = [[False] * (LENGTH // BLOCK)] * 2
STARTS = [[False, True, False, True, True], [True, False, False, False, True]]


class Layers(LayerConfig):
    """Layer settings for one mixer, with the method `mixers` of a model's settings."""

    name: str

    def mixers(self):
        return [self.name]


def build(name, **attention):
    torch.manual_seed(2)
    mixer = name.split()[0]
    settings = {"width": WIDTH, "heads": HEADS, "ffn": 1, "block": BLOCK, "name": mixer, **SETTINGS[name]}
    if name not in ("gss", "ssm", "mamba2", "gated-deltanet"):
        settings["attention"] = {"buckets": 8, "max_distance": 9, **attention}
    model = MIXERS[mixer](parse(Layers, settings)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model, torch.randn(2, LENGTH, WIDTH, dtype=torch.float64, requires_grad=True)


def bucket(distance, buckets=8, farthest=9):
    if distance < buckets // 2:
        return distance
    ratio = math.log(distance / (buckets // 2)) / math.log(farthest / (buckets // 2))
    return min(buckets - 1, buckets // 2 + int(ratio * (buckets - buckets // 2)))


def normal(x):
    return x / torch.sqrt((x * x).sum())


def turned(x, position, base=10_000.0):
    """Return one head's vector rotated to its position (RoPE), pair by pair."""
    half, out = len(x) // 2, list(x)
    for i in range(half):
        angle = position * base ** (-i / half)
        out[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        out[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
    return torch.stack(out)


def softmax_read(scores, values):
    if not scores:
        return torch.zeros(HEAD, dtype=torch.float64)
    weights = [torch.exp(score - max(s.item() for s in scores)) for score in scores]
    return sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)


def head_of(x, h):
    return x[h * HEAD : (h + 1) * HEAD]


def document(starts, t):
    return sum(starts[: t // BLOCK + 1])


def literal_attention(attention, u, starts, sees, detached=lambda t, j: False, more=lambda t, h, q: []):
    """Return self-attention of one row, token by token and head by head.

    Token t attends to the positions j that `sees(t, j)` allows, and to `more` keys and values in the same softmax.
    """
    weight = attention.qkv.weight
    rope, rows = attention.config.position == "rope", []
    for t in range(len(u)):
        heads = []
        for h in range(HEADS):
            q = normal(head_of(weight[:WIDTH] @ u[t], h)) * attention.scale[h]
            scores, values = [], []
            for j in range(t + 1 if attention.config.include_self else t):
                if not sees(t, j) or document(starts, j) != document(starts, t):
                    continue
                k = normal(head_of(weight[WIDTH : 2 * WIDTH] @ u[j], h))
                v = head_of(weight[2 * WIDTH :] @ u[j], h)
                k, v = (x.detach() if detached(t, j) else x for x in (k, v))
                score = turned(q, t) @ turned(k, j) if rope else q @ k + attention.bias.weight[h, bucket(t - j)]
                scores.append(score)
                values.append(v)
            for k, v in more(t, h, q):
                scores.append(q @ k)
                values.append(v)
            heads.append(softmax_read(scores, values))
        rows.append(torch.cat(heads))
    return torch.stack(rows)


def window(size, include_self=True):
    return lambda t, j: t - j < size if include_self else t - j <= size


def transformer_xl(model, u, starts):
    seen = window(8, model.attention.config.include_self)
    return literal_attention(model.attention, u, starts, seen, lambda t, j: j // 8 < t // 8) @ model.out.weight.T


def full(model, u, starts):
    return literal_attention(model.attention, u, starts, lambda t, j: True) @ model.out.weight.T


def no_cross(model, u, starts):
    own = literal_attention(model.attention, u, starts, window(BLOCK, model.attention.config.include_self))
    return own @ model.out.weight[:, :WIDTH].T


def block_recurrent(model, u, starts):
    """Return the output block by block: tokens attend to the state, then the state attends to itself and 2W tokens."""
    own = literal_attention(model.attention, u, starts, window(BLOCK, model.attention.config.include_self))
    cell, rows, state = model.cell, [], model.initial
    for i in range(len(u) // BLOCK):
        if starts[i]:
            state = model.initial
        known = [
            c / torch.sqrt((c * c).mean() + 1e-6) * cell.norm.weight + e
            for c, e in zip(state, cell.identity, strict=True)
        ]
        parts = [cell.project.weight @ s for s in known]
        keys = [p[2 * WIDTH : 3 * WIDTH] for p in parts]
        values = [p[3 * WIDTH :] for p in parts]
        for t in range(i * BLOCK, (i + 1) * BLOCK):
            cross = read(model.query.weight @ u[t], model.scale, keys, values)
            rows.append(model.out.weight @ torch.cat((own[t], cross)))
        first = i * BLOCK if starts[i] else max(0, (i - 1) * BLOCK)
        tokens = [model.attention.qkv.weight @ u[t] for t in range(first, (i + 1) * BLOCK)]
        token_keys, token_values = [p[WIDTH : 2 * WIDTH] for p in tokens], [p[2 * WIDTH :] for p in tokens]
        gate, updated = 1 / (1 + torch.exp(-cell.gate)), []
        for c, p in zip(state, parts, strict=True):
            a = read(p[:WIDTH], cell.self_scale, keys, values)
            b = read(p[WIDTH : 2 * WIDTH], cell.token_scale, token_keys, token_values)
            updated.append(gate * c + (1 - gate) * (cell.update.weight @ torch.cat((a, b))))
        state = torch.stack(updated)
    return torch.stack(rows)


def read(query, scale, keys, values):
    """Return one query's attention to a list of unnormalised keys, for all heads."""
    heads = []
    for h in range(HEADS):
        q = normal(head_of(query, h)) * scale[h]
        heads.append(softmax_read([q @ normal(head_of(k, h)) for k in keys], [head_of(v, h) for v in values]))
    return torch.cat(heads)


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def literal_ssm(ssm, z, starts, output=0):
    """x_t = Ā x_{t-1} + B̄ z_t, y_t = 2 Re(C x_t) + d z_t for each channel, from continuous parameters."""
    modes, own = ssm.read_out.shape[2], min(output, len(ssm.log_decay) - 1)
    a = torch.complex(-torch.exp(ssm.log_decay[own]), ssm.frequency[own]).expand(z.shape[1], modes)
    step = torch.exp(a * torch.exp(ssm.log_dt[own]).unsqueeze(1))
    into, read_out = (step - 1) / a, torch.view_as_complex(ssm.read_out[output])
    x, rows = torch.zeros_like(step), []
    for t in range(len(z)):
        if t % BLOCK == 0 and starts[t // BLOCK]:
            x = torch.zeros_like(step)
        x = step * x + into * z[t].unsqueeze(1)
        rows.append(2 * (read_out * x).sum(1).real + ssm.skip[output] * z[t])
    return torch.stack(rows)


def joint(model, u, starts):
    """Return the output with one softmax over a token's window and its block's context states (without positions)."""
    context = model.cross.context
    y = [literal_ssm(context.ssm, u @ model.down.weight.T, starts, i) for i in range(len(context.ssm.read_out))]

    def filters(t, h, q):
        block = t // BLOCK
        for i in range(len(y)):
            before = context.initial[i] if block == 0 or starts[block] else y[i][block * BLOCK - 1]
            k, v = (context.key_value.weight @ (before + context.identity[i])).split(WIDTH)
            yield normal(head_of(k, h)), head_of(v, h)

    def stream(t, h, q):
        for j in range(t // BLOCK * BLOCK, t + 1):
            k, v = (y[h if len(y) > 1 else 0][j] @ context.key_value[h]).split(HEAD)
            yield normal(k), v

    more = filters if hasattr(context, "identity") else stream
    sees = window(BLOCK, model.attention.config.include_self)
    return literal_attention(model.attention, u, starts, sees, more=more) @ model.out.weight.T


def gss(model, u, starts):
    y = literal_ssm(model.ssm, gelu(u @ model.down.weight.T), starts)
    return (gelu(u @ model.gate.weight.T) * (y @ model.up.weight.T)) @ model.out.weight.T


def pure_ssm(model, u, starts):
    both = gelu(literal_ssm(model.ssm, u, starts)) @ model.out.weight.T
    return both[:, :WIDTH] / (1 + torch.exp(-both[:, WIDTH:]))


def silu(x):
    return x / (1 + torch.exp(-x))


def literal_selective(scan, x, dt, b, c, starts):
    """h_t = exp(-dt A) h_{t-1} + dt b_t x_t', y_t = c_t h_t of each head, token by token; x is [t][head] -> (P,)."""
    state, rows = {}, []
    for t in range(len(x)):
        heads = []
        for h in range(len(x[t])):
            step = torch.log(1 + torch.exp(dt[t][h] + scan.step[h]))
            fresh = t == 0 or (t % BLOCK == 0 and starts[t // BLOCK])
            before = torch.zeros(len(b[t]), len(x[t][h]), dtype=torch.float64) if fresh else state[h]
            state[h] = torch.exp(-step * torch.exp(scan.log_decay[h])) * before + step * torch.outer(b[t], x[t][h])
            heads.append(c[t] @ state[h])
        rows.append(heads)
    return rows


def convolved(convolution, x, starts):
    """Return the causal convolution of each channel, without inputs of other documents."""
    taps = convolution.weight.shape[1]
    return [
        sum(
            convolution.weight[:, taps - 1 - back] * x[t - back]
            for back in range(min(taps, t + 1))
            if document(starts, t - back) == document(starts, t)
        )
        + convolution.bias
        for t in range(len(x))
    ]


def mamba2(model, u, starts):
    inner, state, heads = model.inner, model.state, len(model.skip)
    parts = [model.into.weight @ u[t] for t in range(len(u))]
    mixed = [
        silu(one) for one in convolved(model.convolution, [p[inner : 2 * inner + 2 * state] for p in parts], starts)
    ]
    x = [one[:inner].view(heads, -1) for one in mixed]
    b, c = [one[inner : inner + state] for one in mixed], [one[inner + state :] for one in mixed]
    y = literal_selective(model.scan, x, [p[2 * inner + 2 * state :] for p in parts], b, c, starts)
    rows = []
    for t in range(len(u)):
        out = torch.cat([y[t][h] + model.skip[h] * x[t][h] for h in range(heads)]) * silu(parts[t][:inner])
        rows.append(model.out.weight @ (out / torch.sqrt((out * out).mean() + 1e-6) * model.norm.weight))
    return torch.stack(rows)


def gated_deltanet(model, u, starts):
    """Return the output with each head's state as a matrix, updated token by token by the delta rule."""
    mixed = [silu(x) for x in convolved(model.convolution, [model.into.weight @ x for x in u], starts)]
    wide, rows, state = 2 * HEAD, [], {}
    for t in range(len(u)):
        decay_in, strength_in = (model.gates.weight @ u[t]).view(2, HEADS)
        heads = []
        for h in range(HEADS):
            q, k = normal(head_of(mixed[t][:WIDTH], h)), normal(head_of(mixed[t][WIDTH : 2 * WIDTH], h))
            v = mixed[t][2 * WIDTH + h * wide : 2 * WIDTH + (h + 1) * wide]
            if t == 0 or (t % BLOCK == 0 and starts[t // BLOCK]):
                state[h] = torch.zeros(HEAD, wide, dtype=torch.float64)
            step = torch.log(1 + torch.exp(decay_in[h] + model.rule.step[h]))
            strength = 1 / (1 + torch.exp(-strength_in[h]))
            before = torch.exp(-step * torch.exp(model.rule.log_decay[h])) * state[h]
            state[h] = before - strength * torch.outer(k, k @ before) + strength * torch.outer(k, v)
            y = q @ state[h]
            heads.append(y / torch.sqrt((y * y).mean() + 1e-6) * model.norm.weight)
        rows.append(model.out.weight @ (torch.cat(heads) * silu(model.gate.weight @ u[t])))
    return torch.stack(rows)


LITERAL = {
    "transformer-xl": transformer_xl,
    "block-recurrent": block_recurrent,
    "gss": gss,
    "ssm": pure_ssm,
    "mamba2": mamba2,
    "gated-deltanet": gated_deltanet,
    "full": full,
    "bst-no-cross": no_cross,
    **{f"bst-joint {variant}": joint for variant in ("SH", "MH", "MF")},
}
CASES = [(name, {}) for name in LITERAL]
for other in ({"position": "rope"}, {"include_self": False}, {"position": "rope", "include_self": False}):
    CASES += [(name, other) for name in ("transformer-xl", "block-recurrent", "full", "bst-joint SH", "bst-joint MF")]


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    """Use several tiles of queries, the last one shorter, with keys beyond the last bucket's distance."""
    monkeypatch.setattr("bst_dist.model.baselines.full.QUERY_TILE", 3)


@pytest.mark.parametrize("starts", [NO_STARTS, STARTS], ids=["one document", "isolated documents"])
@pytest.mark.parametrize(("name", "attention"), CASES, ids=lambda case: str(case))
def test_forward_and_gradients_equal_the_equations(name, attention, starts):
    model, u = build(name, **attention)
    weight = torch.randn(2, LENGTH, WIDTH, dtype=torch.float64)
    expected = torch.stack([LITERAL[name](model, row, begin) for row, begin in zip(u, starts, strict=True)])
    given = None if starts is NO_STARTS else torch.tensor(starts)
    found = model(u, Past(), given)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    expected_gradients = gradients((expected * weight).sum(), model, u)
    for key, gradient in gradients((found * weight).sum(), model, u).items():
        if expected_gradients[key] is None:
            assert gradient is None or not gradient.any(), key
        else:
            torch.testing.assert_close(gradient, expected_gradients[key], rtol=1e-7, atol=1e-8)


def gradients(total, model, u):
    named = {"u": u, **dict(model.named_parameters())}
    found = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    return dict(zip(named, found, strict=True))


@pytest.mark.parametrize(("position", "first"), [(0, 8), (4, 4), (8, 8)])
def test_segments_are_counted_from_the_beginning_of_the_stream(position, first):
    """The 12th token of a slice has gradients only in its segment of 8 tokens, from token `first` of the slice."""
    model, u = build("transformer-xl")
    (gradient,) = torch.autograd.grad(model(u, EarlierCall({}, position), None)[:, 11].sum(), u)
    assert not gradient[:, :first].any()
    assert gradient[:, first:12].abs().sum(-1).all()
