"""Every model (BST variants, kernels, baselines, ablations) keeps the contract for the past."""

from __future__ import annotations

import pytest
import torch

from bst_base.settings import ConfigError, parse
from bst_dist.model.baselines.full import LongerThanAllowedError
from bst_dist.model.config import ModelConfig
from bst_dist.model.lm import LanguageModel
from bst_dist.model.ssm.unstructured import DocumentResetError

BLOCK, VOCAB = 8, 23
LENGTH = 5 * BLOCK
STRUCTURED = {
    "s4d": {"ssm": {"state": 4, "chunk": 4}},
    "s4-dplr": {"ssm": {"kernel": "s4-dplr", "state": 4, "chunk": 4}},
}
UNSTRUCTURED = {
    "explicit": {"ssm": {"kernel": "explicit", "length": 2 * BLOCK}},
    "hyena": {"ssm": {"kernel": "hyena", "length": 3 * BLOCK, "hidden": 8, "bands": 2}},
}
CONTEXTS = {
    "SH": {"context": {"variant": "SH"}},
    "MH": {"context": {"variant": "MH"}},
    "MF": {"context": {"variant": "MF", "states": 3}},
}

SSD = {"kernel": "ssd", "state": 3, "head": 2, "chunk": 4}
MAMBA2 = {"state": 3, "head": 8, "chunk": 4}


def bst(contexts, kernels):
    return {
        f"{c} {k}": {"mixer": "bst", **context, **kernel}
        for c, context in contexts.items()
        for k, kernel in kernels.items()
    }


RESETTABLE = {
    **bst(CONTEXTS, {**STRUCTURED, "none": {"ssm": {"kernel": "none"}}}),
    # The default chunk is longer than these blocks.
    "previous": {"mixer": "bst", "context": {"attend": "previous"}},
    "MF default chunk": {"mixer": "bst", **CONTEXTS["MF"]},
    "MF s4-dplr default chunk": {"mixer": "bst", **CONTEXTS["MF"], "ssm": {"kernel": "s4-dplr", "state": 4}},
    "no cross": {"mixer": "bst-no-cross"},
    **{f"{name} joint": {"mixer": "bst-joint", **context, **STRUCTURED["s4d"]} for name, context in CONTEXTS.items()},
    "SH joint rope": {"mixer": "bst-joint", **CONTEXTS["SH"], "attention": {"position": "rope"}},
    "MF joint rope": {"mixer": "bst-joint", **CONTEXTS["MF"], "attention": {"position": "rope"}},
    "MF joint, without self": {"mixer": "bst-joint", **CONTEXTS["MF"], "attention": {"include_self": False}},
    "sliding": {"mixer": "sliding"},
    "transformer-xl": {"mixer": "transformer-xl", "transformer_xl": {"window": 2 * BLOCK}},
    "transformer-xl rope": {
        "mixer": "transformer-xl",
        "transformer_xl": {"window": 2 * BLOCK},
        "attention": {"position": "rope"},
    },
    "block-recurrent": {"mixer": "block-recurrent", "block_recurrent": {"states": 5}},
    "gss": {"mixer": "gss", **STRUCTURED["s4d"]},
    "ssm": {"mixer": "ssm", **STRUCTURED["s4d"]},
    "mamba2": {"mixer": "mamba2", "mamba2": MAMBA2},
    "gated-deltanet": {"mixer": "gated-deltanet", "gated_deltanet": {"chunk": 4}},
    "SH ssd": {"mixer": "bst", **CONTEXTS["SH"], "ssm": SSD},
    "MH ssd": {"mixer": "bst", **CONTEXTS["MH"], "ssm": {**SSD, "chunk": 8}},
    "ssm ssd": {"mixer": "ssm", "ssm": SSD},
    "ssm s4-dplr": {"mixer": "ssm", **STRUCTURED["s4-dplr"]},
    "SH, gate and head": {"mixer": "bst", **CONTEXTS["SH"], "activation": "swiglu", "tied": False},
    "full": {"mixer": "full"},
    "full rope": {"mixer": "full", "attention": {"position": "rope"}},
}
# Heads that together are wider than the model: 2 heads of 12 at width 16.
RESETTABLE |= {
    f"{name}, wide heads": {**RESETTABLE[name], "head_width": 12}
    for name in (
        "SH s4d",
        "MH s4d",
        "MF s4d",
        "SH joint",
        "previous",
        "sliding",
        "transformer-xl rope",
        "block-recurrent",
        "gated-deltanet",
        "full",
    )
}
# One key and value head for both query heads.
RESETTABLE |= {
    f"{name}, shared keys": {**RESETTABLE[name], "attention": {**RESETTABLE[name].get("attention", {}), "kv_heads": 1}}
    for name in ("SH s4d", "MF joint", "sliding", "transformer-xl rope", "block-recurrent", "full", "full rope")
}
FILTERS = {
    **bst(CONTEXTS, UNSTRUCTURED),
    "ssm explicit": {"mixer": "ssm", **UNSTRUCTURED["explicit"]},
    "ssm hyena": {"mixer": "ssm", **UNSTRUCTURED["hyena"]},
}
ALL = {**RESETTABLE, **FILTERS}
# With an FFT, future tokens cancel only up to rounding, here in double precision.
BY_FFT = [name for name in FILTERS if not name.startswith("MF")]


def build(settings):
    torch.manual_seed(3)
    shared = {"width": 16, "heads": 2, "ffn": 16, "block": BLOCK, "vocab_size": VOCAB, "depth": 3, "placement": [0, 2]}
    model = LanguageModel(parse(ModelConfig, {**shared, "filler": "sliding", **settings})).double().eval()
    with torch.no_grad():  # so that biases and scales have an effect
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def tokens(batch=2, length=LENGTH):
    return torch.randint(VOCAB, (batch, length))


def losses(model, ids, **others):
    """Return the loss of each token, (B, l)."""
    return model(ids, (ids + 1) % VOCAB, **others).per_token


@pytest.mark.parametrize(
    "sizes",
    [[2 * BLOCK, BLOCK, 2 * BLOCK], [1] * LENGTH, [4, 4, 3, 1, 4, BLOCK, 2 * BLOCK]],
    ids=["slices", "single tokens", "mixed"],
)
@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_carried_slices_equal_one_long_sequence(name, sizes):
    model, ids = build(ALL[name]), tokens()
    state, position, parts = None, 0, []
    for part in ids.split(sizes, dim=1):
        past = model.carry(state, position)
        parts.append(losses(model, part, past=past))
        state, position = past.after, position + part.shape[1]
    torch.testing.assert_close(torch.cat(parts, 1), losses(model, ids), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", RESETTABLE)
@torch.no_grad()
def test_a_document_reset_equals_separate_documents(name):
    """Documents of 2, 1 and 2 blocks, after a carried past that only the first row continues."""
    model, ids = build(RESETTABLE[name]), tokens()
    earlier = model.carry()
    before = losses(model, tokens(length=2 * BLOCK), past=earlier)
    starts = torch.tensor([[False, False, True, True, False], [True, False, True, True, False]])
    together = losses(model, ids, starts=starts, past=model.carry(earlier.after, before.shape[1]))
    first = losses(model, ids[:, : 2 * BLOCK], past=model.carry(earlier.after, before.shape[1]))
    fresh = [losses(model, ids[:, a * BLOCK : b * BLOCK]) for a, b in ((0, 2), (2, 3), (3, 5))]
    expected = torch.cat((torch.cat((first[:1], fresh[0][1:])), *fresh[1:]), dim=1)
    torch.testing.assert_close(together, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", RESETTABLE)
@torch.no_grad()
def test_a_stream_of_documents_in_several_calls_equals_one_call(name):
    """Windows of several blocks include documents that began, or ended, in an earlier call."""
    model, ids = build(RESETTABLE[name]), tokens()
    starts = torch.tensor([[False, True, False, False, True], [True, False, True, True, False]])
    state, position, parts = None, 0, []
    for part, begins in zip(ids.split(2 * BLOCK, dim=1), starts.split(2, dim=1), strict=True):
        past = model.carry(state, position)
        parts.append(losses(model, part, starts=begins, past=past))
        state, position = past.after, position + part.shape[1]
    torch.testing.assert_close(torch.cat(parts, 1), losses(model, ids, starts=starts), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", FILTERS)
def test_a_filter_refuses_isolated_documents(name):
    starts = torch.zeros(2, LENGTH // BLOCK, dtype=torch.bool)
    with pytest.raises(DocumentResetError, match=r"data\.documents"):
        losses(build(FILTERS[name]), tokens(), starts=starts)


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_no_token_sees_a_later_one(name):
    model, ids = build(ALL[name]), tokens()
    known = losses(model, ids)
    for place in (1, BLOCK - 1, BLOCK, 2 * BLOCK + 3, LENGTH - 1):
        changed = ids.clone()
        changed[:, place:] = (ids[:, place:] + 7) % VOCAB
        tolerance = 1e-10 if name in BY_FFT else 0
        found = losses(model, changed)
        torch.testing.assert_close(found[:, :place], known[:, :place], rtol=0, atol=tolerance)
        assert (found[:, place] != known[:, place]).all()


@pytest.mark.parametrize("name", [name for name in ALL if not name.startswith("full")])
def test_the_carried_state_does_not_grow_with_the_stream(name):
    model, state, sizes = build(ALL[name]), None, []
    for call in range(3):
        past = model.carry(state, call * 4 * BLOCK)
        model(tokens(length=4 * BLOCK), past=past)
        state = past.after
        sizes.append(sum(x.numel() for x in state.values()))
    assert len(set(sizes)) == 1
    assert not any(x.requires_grad for x in state.values())


def test_full_attention_refuses_sequences_above_its_configured_length():
    model = build({"mixer": "full", "full": {"longest": 2 * BLOCK}})
    losses(model, tokens(length=2 * BLOCK))
    with pytest.raises(LongerThanAllowedError, match=r"model\.full\.longest"):
        losses(model, tokens(length=3 * BLOCK))
    with pytest.raises(LongerThanAllowedError):
        model(tokens(length=BLOCK), past=model.carry(None, 2 * BLOCK))


@torch.no_grad()
def test_bst_no_cross_equals_a_bst_with_zero_cross_attention():
    trained = build(ALL["SH s4d"])
    ablated = build({**ALL["SH s4d"], "mixer": "bst-no-cross"})
    ablated.load_state_dict(trained.state_dict())
    for index in (0, 2):
        trained.layers[index].mixer.cross.register_forward_hook(lambda module, args, out: torch.zeros_like(out))
    ids = tokens()
    torch.testing.assert_close(losses(ablated, ids), losses(trained, ids), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mixer": "bst", "ssm": {"kernel": "s4d", "length": 8}}, "length"),
        ({"mixer": "bst", "ssm": {"kernel": "explicit", "length": 8, "state": 4}}, "state"),
        ({"mixer": "bst", "ssm": {"kernel": "explicit"}}, "length"),
        ({"mixer": "bst", "ssm": {"kernel": "s5"}}, "s4-dplr"),
        ({"mixer": "gss", "ssm": {"kernel": "none"}}, "must be s4d"),
        ({"mixer": "transformer-xl", "transformer_xl": {"window": 12}}, "multiple of block"),
        ({"mixer": "mamba2", "mamba2": {"head": 12}}, "mamba2.head 12 must divide mamba2.expand x width, 32"),
        ({"mixer": "mamba2", "mamba2": {"convolution": 16, "head": 8}}, "reaches further back than a block"),
        ({"mixer": "bst", "ssm": {**SSD, "head": 3}}, "ssm.head 3 must divide the SSM's width, 4"),
        ({"mixer": "bst", **CONTEXTS["MF"], "ssm": SSD}, "context.variant must be SH or MH"),
        ({"mixer": "bst-joint", "context": {"attend": "previous"}}, "context.attend must be current"),
    ],
)
def test_settings_that_do_not_fit_the_kernel_or_the_mixer_are_refused(settings, message):
    with pytest.raises((ConfigError, ValueError), match=message):
        build(settings)


@pytest.mark.parametrize(
    ("settings", "unread"),
    [
        ({"mixer": "sliding", "context": {"variant": "MF"}}, ["context"]),
        ({"mixer": "sliding", "ssm": {"state": 4}}, ["ssm"]),
        ({"mixer": "bst", "full": {"longest": 5}}, ["full"]),
        (
            {"mixer": "bst", "attention": {"rope_base": 5e5}, "context": {"states": 8}},
            ["attention.rope_base", "context.states"],
        ),
        (
            {"mixer": "sliding", "attention": {"position": "rope", "buckets": 8, "max_distance": 64}},
            ["attention.buckets", "attention.max_distance"],
        ),
        (
            {
                "mixer": "bst",
                "attention": {"position": "rope", "rope_base": 5e5},
                "context": {"variant": "MF", "states": 8},
            },
            [],
        ),
        ({"mixer": "gss", "attention": {"rope_base": 5e5}, "filler": "gss"}, ["attention"]),
    ],
)
def test_settings_without_effect_are_reported(settings, unread):
    assert build(settings).config.unread() == unread


@pytest.mark.parametrize("name", ALL)
def test_states_stay_in_single_precision_under_autocast(name):
    torch.manual_seed(4)
    model, ids = build(ALL[name]).float(), tokens()
    past = model.carry()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total = model(ids, (ids + 1) % VOCAB, past=past).total
    total.backward()
    recurrent = [x for key, x in past.after.items() if key.endswith(("ssm", "state"))]
    assert all(x.dtype in (torch.float32, torch.complex64) for x in recurrent)
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    torch.testing.assert_close(total, losses(model, ids).sum(), rtol=0.02, atol=0)
