"""Interventions compared with models changed explicitly: whole documents in one pass, loops, no hooks, no slices."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

from bst_base.errors import UserError
from bst_dist.model.layers import MIXERS
from bst_dist.model.ssm.s4d import S4D
from bst_dist.parallel.sequence.past import Past
from bst_dist.study.ablation import interventions
from bst_dist.study.ablation.interventions import Intervention, defaults, intervened, obstacle, parse
from bst_dist.study.ablation.states import Draws

BLOCK, LENGTH = 8, 48
VARIANTS = ("SH", "MH", "MF")
HYENA = {"ssm": {"kernel": "hyena", "length": 20, "hidden": 8, "bands": 2}}
CONTEXT = [
    Intervention("zero"),
    Intervention("shuffle", 3),
    Intervention("delay", 1),
    Intervention("delay", 4),
    Intervention("noise", 0.5),
    Intervention("replace", 2.0),
]
CUTS = [Intervention("forget"), Intervention("no-cross"), Intervention("own-block"), Intervention("no-self")]
ROWS = torch.randint(19, (2, LENGTH), generator=torch.Generator().manual_seed(1))
LABELS = torch.randint(19, (2, LENGTH), generator=torch.Generator().manual_seed(2))


def whole(model, ids=ROWS):
    """Return each token's loss, computed in one pass without a past."""
    return model(ids, LABELS).per_token


def streamed(model, slice_length):
    """Return the same, computed slice by slice."""
    state, found = {}, []
    for at in range(0, LENGTH, slice_length):
        past = model.carry(state, at)
        found.append(model(ROWS[:, at : at + slice_length], LABELS[:, at : at + slice_length], past=past).per_token)
        state = past.after
    return torch.cat(found, dim=1)


def changed_by_hand(seen, intervention, layer, nothing):
    """Return the changed context states, block by block, from those of all blocks: (B, nb, n, *)."""
    found = []
    for i in range(seen.shape[1]):
        draws = Draws(0, layer).at(i)
        own = seen[:, i]
        if intervention.kind == "zero":
            found.append(0 * own)
        elif intervention.kind == "delay":
            back = i - int(intervention.strength)
            found.append(seen[:, back] if back >= 0 else torch.as_tensor(nothing, dtype=own.dtype).expand_as(own))
        elif intervention.kind == "shuffle":
            earlier = list(range(max(0, i - int(intervention.strength)), i))
            back = int(torch.randint(len(earlier), (), generator=draws)) + 1 if earlier else 0
            found.append(seen[:, i - back])
        else:
            size = (own**2).mean(-1, keepdim=True) ** 0.5
            drawn = torch.randn(own.shape[1:], generator=draws).double()
            found.append(own * (intervention.kind == "noise") + intervention.strength * size * drawn)
    return torch.stack(found, dim=1)


def with_context_by_hand(model, intervention, layers):
    """Return a copy of the model whose context states are computed in one pass and changed block by block."""
    model = copy.deepcopy(model)
    for layer in layers:
        context = model.layers[layer].mixer.cross.context

        def stream(z, past, starts, context=context, layer=layer):
            y = context.ssm(z, Past(), None)
            y = changed_by_hand(y.unflatten(1, (-1, BLOCK)), intervention, layer, 0.0).flatten(1, 2)
            weight = context.key_value  # (H, Ds, 2 dh): all heads see one stream, or each its own
            kv = torch.einsum("blhs,hsd->blhd", y.expand(-1, -1, len(weight), -1), weight).unflatten(-1, (2, -1))
            if context.attend == "previous":
                kv = torch.cat((torch.zeros_like(kv[:, :BLOCK]), kv[:, :-BLOCK]), dim=1).unflatten(1, (-1, BLOCK))
            k, v = kv.unbind(-2)
            return k / k.norm(dim=-1, keepdim=True).clamp_min(1e-6), v

        def filters(z, past, starts, context=context, layer=layer):
            ends = (
                context.ssm(z, Past(), None)[:, BLOCK - 1 :: BLOCK]
                if not isinstance(context.ssm, S4D)
                else (context.ssm.block_ends(z, BLOCK, Past()))
            )
            seen = torch.cat((context.initial.expand(len(z), 1, -1, -1), ends[:, :-1]), dim=1)
            seen = changed_by_hand(seen, intervention, layer, context.initial)
            k, v = F.linear(seen + context.identity, context.key_value.weight).unflatten(-1, (2, 2, -1)).unbind(3)
            return k / k.norm(dim=-1, keepdim=True).clamp_min(1e-6), v

        context.forward = filters if hasattr(context, "identity") else stream
    return model


@pytest.mark.parametrize("intervention", CONTEXT, ids=str)
@pytest.mark.parametrize(
    ("variant", "changes"),
    [
        *((variant, {}) for variant in VARIANTS),
        *((variant, HYENA) for variant in VARIANTS),
        ("SH", {"context": {"variant": "SH", "attend": "previous"}}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "s4d",
)
@pytest.mark.parametrize("layers", [[1], [1, 2]], ids=["one layer", "all layers"])
def test_interventions_on_context_states_equal_an_explicit_model_change(
    make_model, intervention, variant, changes, layers
):
    model = make_model(variant=variant, **changes)
    untouched = whole(model)
    expected = whole(with_context_by_hand(model, intervention, layers))
    with intervened(model, intervention, layers):
        torch.testing.assert_close(whole(model), expected, rtol=1e-9, atol=1e-10)
        for slice_length in (BLOCK, 2 * BLOCK):
            torch.testing.assert_close(streamed(model, slice_length), expected, rtol=1e-9, atol=1e-10)
    assert not torch.allclose(untouched, expected, rtol=1e-6)


def attention_by_hand(attention, u, block_only):
    """Return sliding attention, computed token by token and head by head."""
    rows = []
    for row in u:
        q, k, v = (x.unflatten(-1, (attention.heads, -1)) for x in attention.qkv(row).chunk(3, dim=-1))
        q = q / q.norm(dim=-1, keepdim=True) * attention.scale.unsqueeze(-1)
        k = k / k.norm(dim=-1, keepdim=True)
        bias = attention.by_distance(attention.distances, Past())
        out = []
        for t in range(len(row)):
            first = t // BLOCK * BLOCK if block_only else 0
            seen = torch.arange(max(first, t - attention.window.size + 1), t + 1)
            scores = torch.einsum("hd,jhd->hj", q[t], k[seen]) + bias[:, t - seen]
            out.append(torch.einsum("hj,jhd->hd", scores.softmax(-1), v[seen]).flatten())
        rows.append(torch.stack(out))
    return torch.stack(rows)


@pytest.mark.parametrize("mixer", ["bst", "sliding", "transformer-xl", "full"])
def test_own_block_intervention_limits_attention_to_the_block(make_model, mixer):
    sections = {"transformer_xl": {"window": 2 * BLOCK}, "full": {"longest": LENGTH}}
    model = make_model(mixer, **sections)
    by_hand = copy.deepcopy(model)
    for layer in by_hand.layers:
        own = layer.mixer.attention
        own.forward = lambda u, past, starts=None, own=own, **_: attention_by_hand(own, u, block_only=True)
    with intervened(model, Intervention("own-block"), range(3)):
        torch.testing.assert_close(whole(model), whole(by_hand), rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(streamed(model, BLOCK), whole(by_hand), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["no-self", "no-cross"])
def test_removed_attention_part_equals_zero_output_columns(make_model, variant, kind):
    model = make_model(variant=variant)
    by_hand = copy.deepcopy(model)
    for layer in (1, 2):
        columns = slice(0, 16) if kind == "no-self" else slice(16, 32)
        by_hand.layers[layer].mixer.out.weight.data[:, columns] = 0
    with intervened(model, Intervention(kind), [1, 2]):
        torch.testing.assert_close(streamed(model, BLOCK), whole(by_hand), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("variant", "changes"), [*((v, {}) for v in VARIANTS), ("SH", HYENA), ("MF", HYENA)])
def test_forget_intervention_resets_the_ssm_at_each_block(make_model, variant, changes):
    model = make_model(variant=variant, **changes)
    by_hand = copy.deepcopy(model)
    for layer in (1, 2):
        ssm = by_hand.layers[layer].mixer.cross.context.ssm

        def forward(z, past, starts=None, inner=ssm.forward):
            return torch.cat([inner(block, Past()) for block in z.split(BLOCK, dim=1)], dim=1)

        def block_ends(z, block, past, starts=None, inner=ssm.block_ends):
            return torch.cat([inner(block, BLOCK, Past()) for block in z.split(BLOCK, dim=1)], dim=1)

        ssm.forward, ssm.block_ends = forward, block_ends
    with intervened(model, Intervention("forget"), [1, 2]):
        torch.testing.assert_close(whole(model), whole(by_hand), rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(streamed(model, 2 * BLOCK), whole(by_hand), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    "intervention", [Intervention("zero"), Intervention("noise", 0.5), Intervention("replace", 1)], ids=str
)
def test_block_recurrent_intervention_changes_only_the_state_that_is_read(make_model, intervention):
    model = make_model("block-recurrent", block_recurrent={"states": 3})
    by_hand = copy.deepcopy(model)
    for layer in (1, 2):
        cell, blocks = by_hand.layers[layer].mixer.cell, []

        def forward(state, tokens, inner=cell.forward, blocks=blocks, layer=layer):
            blocks.append(state)
            shown = changed_by_hand(torch.stack(blocks, dim=1), intervention, layer, 0.0)[:, -1]
            return *inner(shown, None)[:2], inner(state, tokens)[2]

        cell.forward = forward
    expected = whole(by_hand)
    with intervened(model, intervention, [1, 2]):
        torch.testing.assert_close(whole(model), expected, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(streamed(model, 2 * BLOCK), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("intervention", CONTEXT + CUTS, ids=str)
def test_interventions_keep_the_model_causal(make_model, intervention, variant):
    model = make_model(variant=variant)
    with intervened(model, intervention, [1, 2]):
        before = whole(model)
        for place in (5, BLOCK, 3 * BLOCK - 1, LENGTH - 1):
            other = ROWS.clone()
            other[:, place:] = (other[:, place:] + 1) % 19
            after = whole(model, other)
            torch.testing.assert_close(after[:, :place], before[:, :place], rtol=1e-12, atol=1e-12)
            assert not torch.equal(after[:, place:], before[:, place:])


@pytest.mark.parametrize("mixer", list(MIXERS))
def test_model_is_unchanged_after_an_intervention(make_model, mixer):
    model = make_model(mixer)
    before, attributes = whole(model), {name: set(vars(m)) for name, m in model.named_modules()}
    for intervention in defaults():
        layers = [i for i, layer in enumerate(model.layers) if obstacle(layer.mixer, intervention.kind) is None]
        with pytest.raises(KeyboardInterrupt), intervened(model, intervention, layers):
            whole(model)
            raise KeyboardInterrupt
        assert torch.equal(whole(model), before)
    assert {name: set(vars(m)) for name, m in model.named_modules()} == attributes


def test_applicable_interventions_of_each_mixer(make_model):
    def kinds(mixer, **changes):
        layer = make_model(mixer, **changes).layers[1].mixer
        return {name for name in interventions.KINDS if obstacle(layer, name) is None}

    everything, own = set(interventions.KINDS), {"own-block", "no-self"}
    assert kinds("bst") == everything
    assert kinds("bst", ssm={"kernel": "none"}) == everything - {"forget"}
    assert kinds("block-recurrent") == everything - {"shuffle", "delay", "forget"}
    assert kinds("bst-no-cross") == kinds("sliding") == kinds("transformer-xl") == kinds("full") == own
    assert kinds("ssm") == kinds("gss") == {"forget"}
    assert kinds("bst-joint") == everything - own - {"no-cross"}


def test_interventions_are_parsed_and_printed():
    assert [str(one) for one in defaults()] == [
        "zero",
        "shuffle:16",
        "delay:1",
        "delay:4",
        "noise:0.3",
        "noise:1",
        "replace:1",
        "forget",
        "no-cross",
        "own-block",
        "no-self",
    ]
    assert parse("noise") == [Intervention("noise", 0.3), Intervention("noise", 1)]
    assert parse("delay:2") == [Intervention("delay", 2)]
    for text, said in (
        ("zeroo", "no intervention 'zeroo'"),
        ("zero:1", "has no strength"),
        ("noise:0", "above 0"),
        ("noise:nan", "above 0"),
        ("delay:1.5", "blocks"),
        ("delay:", "blocks"),
    ):
        with pytest.raises(UserError, match=said):
            parse(text)
