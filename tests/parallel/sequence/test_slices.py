"""A sequence in slices has the same gradients as one pass over the whole, in double precision."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from bst_dist.activation.policy import ActivationCheckpointingConfig, policy
from bst_dist.model.lm import LanguageModel, ModelConfig
from bst_dist.parallel.mesh import Mesh
from bst_dist.parallel.sequence.group import SequenceGroup
from bst_dist.parallel.sequence.neighbour import past_of_slice
from bst_dist.parallel.sequence.past import EarlierCall
from bst_dist.parallel.sequence.slices import EdgesHere, Spacing, go_backward

BLOCK, VOCABULARY = 4, 23
TOLERANCE = 1e-10

MODELS = {
    "sliding": {"mixer": "sliding"},
    "sliding, rope": {"mixer": "sliding", "attention": {"position": "rope"}},
    "SH": {"context": {"variant": "SH"}},
    "SH, previous": {"context": {"variant": "SH", "attend": "previous"}},
    "MH": {"context": {"variant": "MH"}},
    "MF": {"context": {"variant": "MF", "states": 3}},
    "MF, joint": {"mixer": "bst-joint", "context": {"variant": "MF", "states": 3}},
    "SH, s4-dplr": {"ssm": {"kernel": "s4-dplr", "state": 4, "chunk": 4}},
    "ssm": {"mixer": "ssm"},
    "gss": {"mixer": "gss"},
    "mamba2": {"mixer": "mamba2", "mamba2": {"state": 3, "head": 8, "chunk": 4}},
    "SH, ssd": {"ssm": {"kernel": "ssd", "state": 4, "chunk": 4, "head": 2}},
    "block-recurrent": {"mixer": "block-recurrent", "block_recurrent": {"states": 3}},
    "transformer-xl": {"mixer": "transformer-xl", "transformer_xl": {"window": 2 * BLOCK}},
    "SH, hyena": {"ssm": {"kernel": "hyena", "length": 3 * BLOCK + 1}},
    "MF, explicit": {"context": {"variant": "MF", "states": 3}, "ssm": {"kernel": "explicit", "length": 5 * BLOCK}},
}
SERIAL = ("block-recurrent", "SH, s4-dplr")
"""Models whose state cannot be passed between ranks."""


def model(name: str) -> LanguageModel:
    """Return two layers of the kind with a sliding layer between them; no parameter has a special value."""
    config = ModelConfig(
        **{
            "width": 16,
            "heads": 2,
            "ffn": 24,
            "block": BLOCK,
            "depth": 3,
            "placement": [0, 2],
            "vocab_size": VOCABULARY,
            "mixer": "bst",
            "ssm": {"state": 4, "chunk": 4, "dt_min": 0.01},
            **MODELS[name],
        }
    )
    torch.manual_seed(0)
    built = LanguageModel(config).double()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return built


def batch(rows: int, blocks: int, starts: Tensor | None = None, seed: int = 0) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (rows, blocks * BLOCK + 1), generator=generator)
    mask = torch.rand(rows, blocks * BLOCK, generator=generator) < 0.8
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:], "loss_mask": mask, "starts": starts}


class Sliced:
    """Slices of a batch, each shared by the ranks of a group if there is one; runs the model itself."""

    def __init__(self, of: LanguageModel, whole: dict, lengths: list[int], group: SequenceGroup | None = None) -> None:
        self.of, self.lengths, self.group, self.total = of, lengths, group, 0.0
        self.left: list[int] = []
        """The slices that were run without an autograd graph."""
        self.whole = whole

    def part(self, s: int) -> dict[str, Tensor | None]:
        """Return this rank's part of slice `s`."""
        size, rank = (self.group.size, self.group.rank) if self.group else (1, 0)
        share = self.lengths[s] // size
        begin = sum(self.lengths[:s]) + rank * share
        cut = {name: x[:, begin : begin + share] for name, x in self.whole.items() if x is not None}
        if "starts" in cut:
            cut["starts"] = self.whole["starts"][:, begin // BLOCK : (begin + share) // BLOCK]
        return cut

    def past(self, s: int, earlier: EarlierCall | None):
        return past_of_slice(self.group, self.part(s)["input_ids"].shape[1], earlier)

    def needs_no_edge(self, s: int) -> bool:
        starts = self.whole["starts"]
        return starts is not None and self.group is None and bool(starts[:, sum(self.lengths[:s]) // BLOCK].all())

    def run_for_edge(self, s: int, past: EarlierCall) -> None:
        self.left.append(s)
        part = self.part(s)
        self.of(part["input_ids"], starts=part.get("starts"), past=self.past(s, past))

    def loss(self, s: int, past: EarlierCall | None) -> Tensor:
        loss = self.of(**self.part(s), past=self.past(s, past)).total
        self.total += float(loss.detach())
        return loss

    def backward(self, s: int, loss: Tensor) -> None:
        loss.backward()


def gradients(of: LanguageModel) -> dict[str, Tensor]:
    found = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in of.named_parameters()}
    of.zero_grad(set_to_none=True)
    return found


def one_pass(of: LanguageModel, whole: dict, carried: EarlierCall | None = None) -> tuple[float, dict[str, Tensor]]:
    loss = of(**whole, past=carried).total
    loss.backward()
    return float(loss.detach()), gradients(of)


def errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Return the relative errors above TOLERANCE; for tiny gradients relative to 1e-6 of the largest."""
    least = 1e-6 * max(float(x.norm()) for x in expected.values())
    off = {n: float((found[n] - x).norm() / x.norm().clamp(min=least)) for n, x in expected.items()}
    return {name: error for name, error in off.items() if not error <= TOLERANCE}


def lengths_of(blocks: int, cuts: set[int]) -> list[int]:
    """Return the tokens of the slices that result from cuts before these blocks."""
    edges = [0, *sorted(cuts), blocks]
    return [(b - a) * BLOCK for a, b in pairwise(edges)]


@st.composite
def slicings(draw) -> dict:
    """Draw any kind of layer, any slices of whole blocks, with or without documents and a carried past."""
    name = draw(st.sampled_from(list(MODELS)))
    blocks = draw(st.integers(2, 9))
    unit = 2 if name == "transformer-xl" else 1  # a slice must not cut a segment
    blocks = -(-blocks // unit) * unit
    cuts = {unit * cut for cut in draw(st.sets(st.integers(1, max(1, blocks // unit - 1)))) if unit * cut < blocks}
    rows = draw(st.integers(1, 2))
    starts = None
    if draw(st.booleans()) and "explicit" not in name and "hyena" not in name:
        bits = draw(st.lists(st.booleans(), min_size=rows * blocks, max_size=rows * blocks))
        starts = torch.tensor(bits).view(rows, blocks)
    return {
        "name": name,
        "rows": rows,
        "blocks": blocks,
        "lengths": lengths_of(blocks, cuts),
        "starts": starts,
        "carried": draw(st.booleans()),
        "again": draw(st.booleans()),
        "every": draw(st.integers(1, 5)),
    }


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(slicings())
def test_any_slicing_gives_the_gradients_of_one_pass(case):
    """Includes documents, a past from an earlier step, recomputed edges, and activation checkpointing in slices."""
    of = model(case["name"])
    carried = None
    if case["carried"]:
        before = of.carry()
        with torch.no_grad():
            of(**batch(case["rows"], 4, seed=1), past=before)
        carried = of.carry(before.after, 4 * BLOCK)
    whole = batch(case["rows"], case["blocks"], case["starts"])
    one = of.carry(carried.before if carried else None, carried.position if carried else 0)
    loss, expected = one_pass(of, whole, one)
    if case["again"]:
        of.checkpoint = policy(ActivationCheckpointingConfig(policy="every-layer"), of.layers)
    edges, sliced = EdgesHere(), Sliced(of, whole, case["lengths"])
    last = go_backward(sliced, edges, carried, case["every"])
    assert errors(gradients(of), expected) == {}
    assert sliced.total == pytest.approx(loss, rel=1e-12)
    assert edges == []
    assert set(last) == (set(one.after) if carried else set())
    for name, value in one.after.items() if carried else ():
        torch.testing.assert_close(last[name], value, rtol=1e-9, atol=1e-12)
        assert not last[name].requires_grad


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_layer_has_the_gradients_of_one_pass(name):
    """In slices shorter than the reach of filters and of Transformer-XL, so that edges hold more than one slice."""
    of, whole = model(name), batch(2, 8)
    _, expected = one_pass(of, whole)
    unit = 2 if name == "transformer-xl" else 1
    go_backward(Sliced(of, whole, [unit * BLOCK] * (8 // unit)), EdgesHere())
    assert errors(gradients(of), expected) == {}


def test_a_gradient_lost_at_an_edge_is_detected():
    """The comparison distinguishes exact gradients from a cache without gradients."""
    of, whole = model("SH"), batch(1, 6)
    _, expected = one_pass(of, whole)
    state, sliced = {}, Sliced(of, whole, [2 * BLOCK] * 3)
    for s in range(3):
        past = EarlierCall(state, 2 * BLOCK * s)
        sliced.loss(s, past).backward()
        state = past.after
    assert errors(gradients(of), expected) != {}


def test_no_edge_is_kept_before_a_slice_that_begins_a_document():
    of = model("SH")
    starts = torch.zeros(1, 6, dtype=torch.bool)
    starts[0, 2] = True
    whole, kept = batch(1, 6, starts), []

    class Counted(EdgesHere):
        def push(self, edge):
            kept.append(len(edge))
            self.append(edge)

    _, expected = one_pass(of, whole)
    sliced = Sliced(of, whole, [2 * BLOCK] * 3)
    go_backward(sliced, Counted())
    assert errors(gradients(of), expected) == {}
    assert sliced.left == [1]
    assert kept == [0, 0]


def test_slices_before_a_document_start_are_not_run_for_later_edges():
    """Of slices 0 to 2 only the last is run, or none: first for the edges before 3 and 6, then for those between."""
    of, blocks = model("SH"), 8
    for begins, left in ((2, [2, 3, 4, 5, 6, 3, 4, 0]), (3, [3, 4, 5, 6, 3, 4, 0, 1])):
        starts = torch.zeros(1, blocks, dtype=torch.bool)
        starts[0, begins] = True
        whole = batch(1, blocks, starts)
        _, expected = one_pass(of, whole)
        sliced = Sliced(of, whole, [BLOCK] * blocks)
        go_backward(sliced, EdgesHere(), every=3)
        assert errors(gradients(of), expected) == {}
        assert sliced.left == left


@pytest.mark.parametrize(
    ("slices", "every", "passes", "waiting", "between"),
    [
        (7, 1, 6, 6, 0),
        (9, 3, 12, 2, 2),
        (8, 3, 11, 2, 2),
        (7, 3, 10, 2, 2),
        (256, 16, 480, 15, 15),
        (4, 3, 5, 1, 2),
    ],
)
def test_numbers_of_kept_edges_and_extra_passes_equal_the_plan(slices, every, passes, waiting, between):
    """Counted with slices that compute nothing and leave their number as edge."""
    edges, run, most = EdgesHere(), 0, 0
    anchor = torch.zeros(1, requires_grad=True)

    class Nothing:
        lengths = [1] * slices

        def needs_no_edge(self, s):
            return False

        def run_for_edge(self, s, past):
            nonlocal run
            assert set(past.before) == ({str(s)} if s else set())
            run += 1
            past.leave(str(s + 1), anchor.detach())

        def loss(self, s, past):
            assert set(past.before) == ({str(s)} if s else set())
            past.leave(str(s + 1), anchor)
            return anchor.sum()

        def backward(self, s, loss):
            nonlocal most
            most = max(most, sum(map(bool, edges)) + (s > 0))

    spacing = Spacing(slices, every)
    go_backward(Nothing(), edges, every=every)
    assert (run, most) == (passes, waiting)
    assert (spacing.passes, spacing.waiting, spacing.between) == (passes, waiting, between)


def test_recomputed_layers_leave_no_carried_state():
    """Otherwise, what they leave in the backward pass would keep a second graph of the slice alive."""
    of, whole = model("MF"), batch(1, 4)
    of.checkpoint = policy(ActivationCheckpointingConfig(policy="every-layer"), of.layers)
    seen = []

    class Watched(Sliced):
        def loss(self, s, past):
            self.given = past
            return super().loss(s, past)

        def backward(self, s, loss):
            loss.backward()
            seen.append(len(self.given.after))

    go_backward(Watched(of, whole, [2 * BLOCK] * 2), EdgesHere())
    assert seen == [0, 0]


@pytest.mark.ranks
@pytest.mark.parametrize("sp", [2, 4])
def test_slices_spread_over_ranks_have_the_gradients_of_one_process(on_ranks, sp):
    """Gradients go back over the ring; documents begin at a slice, inside a slice, and in one row only.

    Four ranks also have ranks between the first and the last; there one model of each kind of exchange is tested.
    """
    spread = [name for name in MODELS if name not in SERIAL and "hyena" not in name and "explicit" not in name]
    names, again = (spread, ("SH", "MF")) if sp == 2 else (["SH", "MF"], ())
    blocks = 4 * sp
    starts = torch.zeros(2, blocks, dtype=torch.bool)
    starts[0, sp] = starts[1, sp] = starts[0, 2 * sp + 1] = starts[1, -1] = True

    def wrong() -> dict:
        # Each rank makes the reference pass: threads that torch starts in a backward pass do not survive a fork.
        group, found = Mesh(sp, dist.get_rank(), sp).sp_group(), {}
        for name, begins in product(names, (None, starts)):
            if begins is not None and name == "transformer-xl":
                continue
            unit = 2 if name == "transformer-xl" else 1
            of, whole = model(name), batch(2, unit * blocks, begins)
            _, expected = one_pass(of, whole)
            for how, every in (("none", 1), ("every-layer", 3)) if name in again else (("none", 1),):
                of.checkpoint = policy(ActivationCheckpointingConfig(policy=how), of.layers)
                go_backward(Sliced(of, whole, [unit * sp * BLOCK] * 4, group), EdgesHere(), every=every)
                mine = gradients(of)
                for gradient in mine.values():
                    dist.all_reduce(gradient, group=group.process_group)
                if off := errors(mine, expected):
                    found[name, begins is not None, how] = off
        return found

    assert on_ranks(sp, wrong) == [{}] * sp
