"""Sequence parallelism against one process: the same losses, gradients and leftovers, in double precision."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from bst_dist.model.lm import LanguageModel, ModelConfig
from bst_dist.parallel.group import SequenceGroup
from bst_dist.parallel.mesh import Mesh
from bst_dist.parallel.neighbour import LeftNeighbour, SequenceParallelError
from bst_dist.parallel.past import EarlierCall, Past

BLOCK, ROWS, VOCABULARY = 8, 2, 29
RELATIVE_ERROR = 1e-10


def model(mixer: str = "bst", variant: str = "SH", position: str = "t5", attend: str = "current") -> LanguageModel:
    """Two layers with a sliding one between them, in double precision, the same on every rank."""
    config = ModelConfig(
        width=16, heads=2, ffn=24, block=BLOCK, depth=3, mixer=mixer, placement=[0, 2], vocab_size=VOCABULARY,
        attention={"position": position},
        context={"variant": variant, "attend": attend, "states": 3},
        ssm={"state": 4, "chunk": 4, "dt_min": 0.01},
    )  # fmt: skip
    torch.manual_seed(0)
    built = LanguageModel(config).double()
    for name, parameter in built.named_parameters():
        if name.endswith("bias.weight"):  # zero at the start, where its gradient would say little
            torch.nn.init.normal_(parameter, std=0.3)
    return built


def data(length: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """One global batch."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (ROWS, length + 1), generator=generator)
    mask = torch.rand(ROWS, length, generator=generator) < 0.9
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:], "loss_mask": mask}


def part(batch: dict, rank: int, size: int) -> dict:
    """The slice of `batch` that a rank holds."""
    return {name: x.chunk(size, dim=1)[rank] for name, x in batch.items()}


def gradients(of: LanguageModel) -> dict[str, torch.Tensor]:
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in of.named_parameters()}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp(min=1e-300)) if b.norm() or a.norm() else 0.0


def one_process(of: LanguageModel, calls: list[dict], carry: bool) -> list[tuple]:
    """(loss, losses by token, gradients) of consecutive calls on the whole sequences, and what each left."""
    results, state = [], None
    for batch in calls:
        past = of.carry(state) if carry else Past()
        of.zero_grad()
        out = of(**batch, past=past)
        out.total.backward()
        state = past.after if carry else None
        results.append((out.total.detach(), out.per_token, gradients(of), state))
    return results


def compare(group: SequenceGroup, of: LanguageModel, calls: list[dict], carry: bool = False) -> float:
    """The largest relative error of the group against one process, over all of `one_process`'s results."""
    expected, state, worst = one_process(of, calls, carry), None, 0.0
    for batch, (loss, per_token, grads, leftovers) in zip(calls, expected, strict=True):
        earlier = EarlierCall(state) if carry else None
        of.zero_grad()
        out = of(**part(batch, group.rank, group.size), past=LeftNeighbour(group, earlier))
        out.total.backward()
        mine = gradients(of)
        total = out.total.detach().clone()
        for summed in (total, *mine.values()):
            dist.all_reduce(summed, group=group.process_group)
        errors = [relative(total, loss), relative(out.per_token, per_token.chunk(group.size, 1)[group.rank])]
        errors += [relative(mine[name], grads[name]) for name in grads]
        if carry:
            state = earlier.after
            leftovers = {name: x for name, x in leftovers.items() if x.numel() and group.rank == 0}
            assert set(state) == set(leftovers)
            errors += [relative(state[name], leftovers[name]) for name in state]
        worst = max(worst, *errors)
    return worst


MODELS = [
    {"variant": "SH"},
    {"variant": "MH", "position": "rope"},
    {"variant": "MF"},
    {"variant": "MF", "position": "rope"},
    {"variant": "SH", "attend": "previous", "position": "rope"},
    {"mixer": "sliding"},
    {"mixer": "sliding", "position": "rope"},
]


def starts(length: int) -> torch.Tensor:
    """A document that begins where a slice does (whatever sp), one within a slice, a row that has none."""
    begins = torch.zeros(ROWS, length // BLOCK, dtype=torch.bool)
    begins[0, length // BLOCK // 2] = True
    begins[0, 1] = True
    begins[0, -1] = True
    return begins


def every_way(settings: dict) -> dict[str, float]:
    """All ways to run one model, compared with one process: worst error of each."""
    group = Mesh(dist.get_world_size(), dist.get_rank(), sp=dist.get_world_size()).sp_group()
    of, errors = model(**settings), {}
    length = 2 * BLOCK * group.size
    for again, reset, carry in itertools.product((False, True), repeat=3):
        of.checkpoint = rerun if again else None
        calls = [data(length, seed) | ({"starts": starts(length)} if reset else {}) for seed in range(1 + carry)]
        errors[f"checkpoint={again} starts={reset} carry={carry}"] = compare(group, of, calls, carry)
    return errors


def rerun(layer, *inputs):
    return checkpoint(layer, *inputs, use_reentrant=False)


@pytest.mark.ranks
@pytest.mark.parametrize("sp", [2, 4, 8])
def test_loss_gradients_and_leftovers_are_one_process_s(on_ranks, sp):
    def check() -> dict[str, dict]:
        return {str(settings): every_way(settings) for settings in (MODELS if sp == 2 else MODELS[:3] + MODELS[4:6])}

    for errors in on_ranks(sp, check):
        for settings, ways in errors.items():
            for way, error in ways.items():
                assert error <= RELATIVE_ERROR, f"{settings}, {way}: {error}"
