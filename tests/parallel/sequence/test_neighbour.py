"""Sequence parallelism equals one process: losses, gradients and the state left to the next call, in fp64."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from bst_dist.model.config import ModelConfig
from bst_dist.model.document_mask import Borders
from bst_dist.model.lm import LanguageModel
from bst_dist.parallel.mesh import Mesh
from bst_dist.parallel.sequence.group import SequenceGroup
from bst_dist.parallel.sequence.neighbour import LeftNeighbour, SequenceParallelError
from bst_dist.parallel.sequence.past import EarlierCall, Past
from bst_dist.plan.rehearse import rehearse

BLOCK, ROWS, VOCABULARY = 8, 2, 29
RELATIVE_ERROR = 1e-10


def model(
    mixer: str = "bst",
    variant: str = "SH",
    position: str = "t5",
    attend: str = "current",
    ssm: dict | None = None,
    head_width: int | None = None,
    kv_heads: int | None = None,
) -> LanguageModel:
    """Return two layers with a sliding layer between them, in double precision, the same on every rank."""
    config = ModelConfig(
        width=16,
        heads=2,
        ffn=24,
        block=BLOCK,
        depth=3,
        mixer=mixer,
        placement=[0, 2],
        vocab_size=VOCABULARY,
        attention={"position": position, "kv_heads": kv_heads},
        head_width=head_width,
        context={"variant": variant, "attend": attend, "states": 3},
        ssm=ssm or {"state": 4, "chunk": 4, "dt_min": 0.01},
    )
    torch.manual_seed(0)
    built = LanguageModel(config).double()
    for name, parameter in built.named_parameters():
        if name.endswith("bias.weight"):  # initialised with 0, where its gradient would test little
            torch.nn.init.normal_(parameter, std=0.3)
    return built


def data(length: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return one global batch. With an odd seed, all tokens of the last slice are masked."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (ROWS, length + 1), generator=generator)
    mask = torch.rand(ROWS, length, generator=generator) < 0.9
    mask[:, -2 * BLOCK :] &= seed % 2 == 0
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:], "loss_mask": mask}


def part(batch: dict, rank: int, size: int) -> dict:
    """Return the slice of `batch` that a rank holds."""
    return {name: own(x, rank, size) for name, x in batch.items()}


def own(x: torch.Tensor | Borders, rank: int, size: int) -> torch.Tensor | Borders:
    if isinstance(x, Borders):
        return Borders.of(own(x.begins, rank, size))
    return x.chunk(size, dim=1)[rank]


def run_again(layer, *inputs):
    return checkpoint(layer, *inputs, use_reentrant=True)


def run_again_in_place(layer, *inputs):
    return checkpoint(layer, *inputs, use_reentrant=False)


def gradients(of: LanguageModel) -> dict[str, torch.Tensor]:
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in of.named_parameters()}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp(min=1e-300)) if b.norm() or a.norm() else 0.0


class Case(NamedTuple):
    """Consecutive calls on whole sequences, and their results in one process."""

    calls: list[dict]
    carry: bool
    expected: list[tuple]
    """For each call: (loss, losses by token, gradients, state left to the next call)."""


def one_process(of: LanguageModel, calls: list[dict], carry: bool) -> Case:
    expected, state, position = [], None, 0
    for batch in calls:
        past = of.carry(state, position) if carry else Past()
        position += batch["labels"].shape[1]
        of.zero_grad()
        out = of(**batch, past=past)
        out.total.backward()
        state = past.after if carry else {}
        expected.append((out.total.detach(), out.per_token, gradients(of), state))
    return Case(calls, carry, expected)


def compare(group: SequenceGroup, of: LanguageModel, case: Case) -> float:
    """Return the largest relative error of the group compared with one process, over all of `case.expected`."""
    state, worst, position = None, 0.0, 0
    for batch, (loss, per_token, grads, leftovers) in zip(case.calls, case.expected, strict=True):
        earlier = EarlierCall(state, position) if case.carry else None
        position += batch["labels"].shape[1]
        of.zero_grad()
        past = LeftNeighbour(group, batch["labels"].shape[1] // group.size, earlier)
        out = of(**part(batch, group.rank, group.size), past=past)
        out.total.backward()
        mine = gradients(of)
        summed = torch.cat([out.total.detach().view(1), *(g.flatten() for g in mine.values())])
        dist.all_reduce(summed, group=group.process_group)
        total, *mine = summed.split([1, *(g.numel() for g in mine.values())])
        errors = [relative(total, loss.view(1)), relative(out.per_token, per_token.chunk(group.size, 1)[group.rank])]
        errors += [relative(a, b.flatten()) for a, b in zip(mine, grads.values(), strict=True)]
        if case.carry:
            state = earlier.after
            leftovers = {name: x for name, x in leftovers.items() if x.numel() and group.rank == 0}
            assert set(state) == set(leftovers)
            errors += [relative(1.0 * state[name], 1.0 * leftovers[name]) for name in state]  # some are integers
        worst = max(worst, *errors)
    return worst


MODELS = [
    {"variant": "SH"},
    {"variant": "MH", "position": "rope", "head_width": 10},
    {"variant": "MF"},
    {"variant": "SH", "attend": "previous", "position": "rope"},
    {"mixer": "sliding", "kv_heads": 1},
    {"mixer": "gss"},
    {"mixer": "ssm"},
]


# Filters that reach over several slices, and a little further than one slice.
FILTERS = [
    {"variant": "SH", "ssm": {"kernel": "hyena", "length": 8 * BLOCK}},
    {"variant": "MH", "ssm": {"kernel": "explicit", "length": 8 * BLOCK}},
    {"variant": "MF", "ssm": {"kernel": "explicit", "length": 8 * BLOCK}},
    {"variant": "MF", "ssm": {"kernel": "hyena", "length": 2 * BLOCK + 3}},
    {"variant": "SH", "ssm": {"kernel": "hyena", "length": 2 * BLOCK}},
]


def starts(length: int) -> torch.Tensor:
    """Return document starts: one at a slice (for any sp), others within slices, and a row with none."""
    begins = torch.zeros(ROWS, length // BLOCK, dtype=torch.bool)
    begins[0, length // BLOCK // 2] = True
    begins[0, 1] = True
    begins[0, -1] = True
    return begins


def cases(of: LanguageModel, size: int) -> dict[str, Case]:
    """Return cases with and without documents, in one call and in two consecutive calls."""
    found, length = {}, 2 * BLOCK * size
    for reset, carry in itertools.product((False, True), repeat=2):
        calls = [data(length, seed) | ({"starts": starts(length)} if reset else {}) for seed in range(1 + carry)]
        found[f"documents={reset} calls={len(calls)}"] = one_process(of, calls, carry)
    return found


@pytest.mark.ranks
@pytest.mark.parametrize("sp", [2, 4, 8])
def test_loss_gradients_and_carried_state_equal_one_process(on_ranks, sp):
    policies = (None, run_again, run_again_in_place) if sp == 2 else (None, run_again)
    built = [model(**settings) for settings in (MODELS if sp < 8 else MODELS[:4])]
    expected = [cases(of, sp) for of in built]

    def errors() -> dict[str, float]:
        group = Mesh(sp, dist.get_rank(), sp).sp_group()
        found = {}
        for settings, of, wanted in zip(MODELS[: len(built)], built, expected, strict=True):
            for (way, case), policy in itertools.product(wanted.items(), policies):
                of.checkpoint = policy
                found[f"{settings} {way} {policy and policy.__name__}"] = compare(group, of, case)
        return found

    for found in on_ranks(sp, errors):
        assert {way: error for way, error in found.items() if not error <= RELATIVE_ERROR} == {}


@pytest.mark.ranks
def test_documents_starting_at_any_token_are_separated_over_ranks(on_ranks):
    """In two consecutive calls, with recomputed layers.

    Documents span several ranks. They begin at a rank's last token, at its first, and within its blocks and chunks.
    """
    sp, length = 4, 2 * 4 * BLOCK
    begins = torch.zeros(ROWS, length, dtype=torch.bool)
    begins[0, [3, 2 * BLOCK, 4 * BLOCK - 1, length - 3]] = True
    begins[1, [5 * BLOCK + 1, 5 * BLOCK + 2]] = True
    built = [model(**settings) for settings in MODELS if settings.get("attend") != "previous"]
    calls = [data(length, seed) | {"starts": Borders.of(begins.roll(seed, 1))} for seed in range(2)]
    expected = [one_process(of, calls, carry=True) for of in built]

    def errors() -> list[float]:
        group = Mesh(sp, dist.get_rank(), sp).sp_group()
        for of in built:
            of.checkpoint = run_again
        return [compare(group, of, case) for of, case in zip(built, expected, strict=True)]

    for found in on_ranks(sp, errors):
        assert max(found) <= RELATIVE_ERROR, found


@pytest.mark.ranks
@pytest.mark.parametrize("sp", [2, 4])
def test_filters_longer_than_a_slice_equal_one_process(on_ranks, sp):
    built = [model(**settings).double() for settings in FILTERS if settings["variant"] != "MF" or sp == 2]
    expected = [one_process(of, [data(2 * BLOCK * sp)], carry=False) for of in built]

    def errors_and_bytes() -> tuple[list[float], list[dict[str, int]]]:
        group, errors, sent = Mesh(sp, dist.get_rank(), sp).sp_group(), [], []
        for of, case in zip(built, expected, strict=True):
            errors.append(compare(group, of, case))
            sent.append(group.traffic.take())
        return errors, sent

    ranks = on_ranks(sp, errors_and_bytes)
    assert max(error for errors, _ in ranks for error in errors) <= RELATIVE_ERROR
    for of, sent in zip(built, ranks[sp // 2][1], strict=True):
        rehearsed = rehearse(of.config, sp, ROWS, 2 * BLOCK)
        assert sent == {kind: 2 * count for kind, count in rehearsed.items()}  # twice the bytes in double precision


@pytest.mark.ranks
def test_bytes_sent_equal_the_formula_at_any_length(on_ranks):
    """One state to every other rank; W keys and values and one set of block ends to the right; gradients as large."""
    width, rows, block, sp = 8, 1, 128, 2
    settings = {"width": width, "heads": 1, "ffn": 8, "block": block, "depth": 1, "mixer": "bst", "vocab_size": 16}
    context, ssm = {"variant": "MF", "states": 4, "ssm_width": 2}, {"state": 6}
    built = LanguageModel(ModelConfig(**settings, context=context, ssm=ssm))

    def sent(length: int) -> dict[str, int]:
        group = Mesh(sp, dist.get_rank(), sp).sp_group()
        ids = torch.zeros(rows, length // sp, dtype=torch.long)
        built(ids, ids, past=LeftNeighbour(group, length // sp)).total.backward()
        return group.traffic.take()

    state = rows * 4 * 2 * 3 * 8 * (sp - 1)  # S x Ds x n complex64
    keys_values, ends = rows * block * 2 * width * 4, rows * 4 * 2 * 4
    first = {"ssm": state, "ssm gradient": state, "kv": keys_values, "ends": ends}
    last = {"ssm": state, "ssm gradient": state, "kv gradient": keys_values, "ends gradient": ends}
    for length in (4096, 65536):
        assert on_ranks(sp, sent, length) == [first, last]
    assert rehearse(built.config, sp, rows, slice_length=2048) == last  # rank sp // 2 is the last of two


@pytest.mark.ranks
def test_messages_keep_their_dtype_and_stay_within_their_sequence(on_ranks):
    """Four ranks, two sequences of two slices, in bfloat16."""

    def check() -> tuple:
        group = Mesh(4, dist.get_rank(), sp=2).sp_group()
        past = LeftNeighbour(group, 3).child("layer")
        x = torch.full((1, 3, 2), 1.0 + dist.get_rank(), dtype=torch.bfloat16, requires_grad=True)
        out = past.extend("kv", x, before=2)
        out.backward(torch.full_like(out, 1.0 + dist.get_rank()))
        return out[0, :, 0].tolist(), x.grad[0, :, 0].tolist(), out.dtype, dict(group.traffic.sent)

    ranks = on_ranks(4, check)
    assert [r[0] for r in ranks] == [[1, 1, 1], [1, 1, 2, 2, 2], [3, 3, 3], [3, 3, 4, 4, 4]]
    assert [r[1] for r in ranks] == [[1, 3, 3], [2, 2, 2], [3, 7, 7], [4, 4, 4]]
    assert all(r[2] == torch.bfloat16 for r in ranks)
    assert [r[3] for r in ranks] == [{"kv": 8}, {"kv gradient": 8}] * 2


@pytest.mark.ranks
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("documents", ["joined", "isolated", "masked"])
def test_bytes_sent_equal_the_rehearsed_bytes(on_ranks, bf16, documents):
    """The middle rank of three, with every layer recomputed in the backward pass."""
    sp, length = 3, 6 * BLOCK
    kinds = [settings for settings in MODELS if documents != "masked" or settings.get("attend") != "previous"]
    built = [model(**settings).float() for settings in kinds]
    begins = {"joined": None, "isolated": starts(length), "masked": Borders.of(torch.rand(ROWS, length) < 0.2)}
    begins = {} if documents == "joined" else {"starts": begins[documents]}

    def sent() -> list[dict[str, int]]:
        group, found = Mesh(sp, dist.get_rank(), sp).sp_group(), []
        for of in built:
            of.checkpoint = run_again
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                out = of(**part(data(length) | begins, group.rank, sp), past=LeftNeighbour(group, length // sp))
            out.total.backward()
            found.append(group.traffic.take())
        return found

    assert on_ranks(sp, sent)[1] == [
        rehearse(of.config, sp, ROWS, length // sp, bf16, documents, run_again=True) for of in built
    ]


def refusal(slice_length: int, documents: str = "joined", **settings) -> str:
    config = ModelConfig(width=16, heads=2, ffn=24, block=BLOCK, depth=2, vocab_size=8, **({"mixer": "bst"} | settings))
    try:
        rehearse(config, 2, 1, slice_length, documents=documents)
    except SequenceParallelError as error:
        return str(error)
    return ""


def test_unsupported_sequence_parallel_models_are_refused_with_the_reason():
    """A filter that reaches at most one slice back is allowed, because the left neighbour has all its inputs."""
    hyena = {"kernel": "hyena", "length": 4 * BLOCK}
    odd = {"variant": "SH", "ssm_width": 5}
    assert "looks 31 positions back (inputs), further than its slice of 24, and its 5 channels" in refusal(
        3 * BLOCK, ssm=hyena, context=odd
    )
    assert refusal(4 * BLOCK, ssm=hyena, context=odd) == ""
    far = {"kernel": "explicit", "length": 20 * BLOCK}  # longer than the dry run's slice for kernels with a state
    assert refusal(20 * BLOCK, ssm=far, context=odd) == ""
    assert "choose a parallel.sp that divides them" in refusal(19 * BLOCK, ssm=far, context=odd)
    assert "s4-dplr" in refusal(4 * BLOCK, ssm={"kernel": "s4-dplr"})
    assert "Block-Recurrent" in refusal(4 * BLOCK, mixer="block-recurrent")
    assert "Lower parallel.sp" in refusal(4 * BLOCK, mixer="full")
    segments = {"mixer": "transformer-xl", "transformer_xl": {"window": 2 * BLOCK}}
    assert "cuts a segment of 16" in refusal(3 * BLOCK, **segments)
    assert refusal(4 * BLOCK, **segments) == ""
    assert "which documents begin there" in refusal(4 * BLOCK, "isolated", **segments)
    assert "which documents begin there" in refusal(4 * BLOCK, "masked", **segments)
