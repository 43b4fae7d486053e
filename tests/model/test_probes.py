from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from bst_dist.model.document_mask import Borders
from bst_dist.model.probes import ContextProbe, kernels, relative_entropy, time_scales
from bst_dist.parallel.sequence.past import Past

BLOCK = 8
IDS = torch.randint(19, (2, 5 * BLOCK), generator=torch.Generator().manual_seed(1))


def half_lives(kernel, length=4000):
    """Return the number of tokens in which each mode's free response decays to 1/e, by simulation."""
    a = torch.exp(-torch.exp(kernel.log_decay.double()) * torch.exp(kernel.log_dt.double()).unsqueeze(-1))
    response = a.unsqueeze(-1) ** torch.arange(length)
    return (response > 1 / math.e).sum(-1).flatten()  # the first token below 1/e


@pytest.mark.parametrize("mixer", ["bst", "ssm", "gss"])
def test_time_scales_match_the_decay_of_each_mode(make_model, mixer):
    for kernel in kernels(make_model(mixer)).values():
        found = time_scales(kernel)
        torch.testing.assert_close(found.ceil().long(), half_lives(kernel).clamp(min=1), rtol=0, atol=1)


def test_time_scales_of_a_dense_recurrence_and_of_a_filter(make_model):
    model = make_model(ssm={"kernel": "s4-dplr", "state": 4, "chunk": 4})
    kernel = kernels(model)[1]
    slowest = time_scales(kernel).max()
    a = kernel.recurrence()[0].detach()
    tokens = range(500, 5000, 13)  # the slowest mode oscillates: fit the slope over many periods
    sizes = [torch.linalg.matrix_norm(torch.linalg.matrix_power(a, t), 2).max().log().item() for t in tokens]
    assert np.polyfit(tokens, sizes, 1)[0] == pytest.approx(float(-1 / slowest), rel=0.03)
    kernel = kernels(make_model(ssm={"kernel": "explicit", "length": 20}))[2]
    window = torch.exp(-torch.exp(kernel.log_decay) / 20 * time_scales(kernel))
    torch.testing.assert_close(window, torch.full_like(window, 1 / math.e))
    assert kernels(make_model("sliding")) == kernels(make_model(ssm={"kernel": "none"})) == {}
    with pytest.raises(TypeError, match="Linear"):
        time_scales(torch.nn.Linear(1, 1))


@pytest.mark.parametrize("variant", ["SH", "MH", "MF", "previous"])
def test_entropy_equals_that_of_explicit_attention_weights(make_model, variant):
    changes = {"context": {"variant": "SH", "attend": "previous"}} if variant == "previous" else {}
    model = make_model(variant="SH" if variant == "previous" else variant, **changes)
    cross = model.layers[1].mixer.cross
    u = torch.randn(1, 5 * BLOCK, 16, dtype=torch.float64)
    z = model.layers[1].mixer.down(u)
    k, _ = cross.context(z, Past(), None)
    q = cross.query(u).unflatten(-1, (2, -1))
    q = F.normalize(q, dim=-1) * cross.scale.unsqueeze(-1)
    expected = []
    for t in range(BLOCK, 5 * BLOCK):  # the last four blocks
        for h in range(2):
            i = t // BLOCK
            keys = k[0, i * BLOCK : t + 1, h] if cross.causal else k[0, i, :, h]
            p = torch.softmax(keys @ q[0, t, h], 0)
            if len(p) > 1:
                expected.append(float(-(p * p.log()).sum().detach()) / math.log(len(p)))
    total, count = relative_entropy(q, k, BLOCK).tolist()
    assert count == len(expected)
    assert total == pytest.approx(sum(expected), rel=1e-5)


@pytest.mark.parametrize("variant", ["SH", "MH", "MF"])
@pytest.mark.parametrize("blocks", [2, 5])
def test_entropy_of_masked_documents_is_over_states_of_the_own_document(make_model, variant, blocks):
    model = make_model(variant=variant)
    cross, heads = model.layers[1].mixer.cross, 2
    begins = torch.zeros(1, blocks * BLOCK, dtype=torch.bool)
    begins[0, [3, 5, 6, BLOCK, 2 * BLOCK - 1]] = True
    inputs = {}
    cross.context.register_forward_pre_hook(lambda _, args: inputs.update(args=args))
    cross.query.register_forward_hook(lambda _, args, output: inputs.update(query=output))
    with torch.no_grad(), ContextProbe(model) as probe:
        model(IDS[:1, : blocks * BLOCK], starts=Borders.of(begins))
    q = inputs["query"][0].unflatten(-1, (heads, -1))
    q = F.normalize(q, dim=-1) * cross.scale.unsqueeze(-1)
    k = cross.context(*inputs["args"])[0][0].detach()
    document = begins[0].cumsum(0)
    expected = []
    for t in range((blocks - min(blocks, 4)) * BLOCK, blocks * BLOCK):
        first = t // BLOCK * BLOCK
        own = [s for s in range(first, t + 1) if document[s] == document[t]]
        for h in range(heads):
            if cross.causal:
                keys = k[own, h]
            else:  # the states at the end of the block before, if the token's document had begun there
                begun = begins[0, first : t + 1].any()
                keys = k[0 if begun else 1 + t // BLOCK, :, h]
            p = torch.softmax(keys @ q[t, h].detach(), 0)
            if len(p) > 1:
                expected.append(float(-(p * p.log()).sum()) / math.log(len(p)))
    total, count = probe.sums[1][2:].tolist()
    assert count == len(expected)
    assert total == pytest.approx(sum(expected), rel=1e-5)


@pytest.mark.parametrize(("mixer", "variant"), [("bst", "SH"), ("bst", "MF"), ("block-recurrent", "SH")])
def test_probed_sums_equal_the_contribution_of_each_part(make_model, mixer, variant):
    model = make_model(mixer, variant)
    before = model(IDS)
    with ContextProbe(model) as probe:
        after = model(IDS)
        first = {index: sums.clone() for index, sums in probe.sums.items()}
        model(IDS.flip(1))  # only the first pass is probed
    assert torch.equal(before, after)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert list(probe.sums) == [1, 2]
    for index, sums in probe.sums.items():
        assert torch.equal(sums, first[index])
        seen = []
        model.layers[index].mixer.out.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        model(IDS)
        weight = model.layers[index].mixer.out.weight
        parts = seen[0][..., :16] @ weight[:, :16].T, seen[0][..., 16:] @ weight[:, 16:].T
        torch.testing.assert_close(sums[:2], torch.stack([(part**2).sum() for part in parts]).detach())
        assert (sums[3] > 0) == (mixer == "bst")


def test_models_without_context_states_give_no_probe_results(make_model):
    for mixer in ("sliding", "bst-no-cross", "ssm"):
        with ContextProbe(make_model(mixer)) as probe:
            assert probe.sums == {}
