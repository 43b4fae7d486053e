"""Documents that begin at any token, compared with each document alone, token by token, in double precision."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from bst_dist.model.config import ModelConfig
from bst_dist.model.document_mask import Borders, room
from bst_dist.model.lm import LanguageModel
from bst_dist.model.masking import masking_problem
from bst_dist.parallel.sequence.past import EarlierCall

BLOCK, VOCABULARY = 8, 13
S4D = {"state": 4, "chunk": 4}
MODELS = {
    "sliding": {"mixer": "sliding"},
    "rope": {"mixer": "sliding", "attention": {"position": "rope"}},
    "without itself": {"mixer": "sliding", "attention": {"include_self": False}},
    "SH": {"mixer": "bst", "ssm": S4D},
    "MH": {"mixer": "bst", "ssm": S4D, "context": {"variant": "MH"}},
    "MF": {"mixer": "bst", "ssm": S4D, "context": {"variant": "MF", "states": 3}},
    "SH s4-dplr": {"mixer": "bst", "ssm": {"kernel": "s4-dplr", "state": 4, "chunk": 4}},
    "MF s4-dplr": {"mixer": "bst", "ssm": {"kernel": "s4-dplr", "state": 4, "chunk": 4}, "context": {"variant": "MF"}},
    "SH ssd": {"mixer": "bst", "ssm": {"kernel": "ssd", "state": 4, "chunk": 4, "head": 2}},
    "SH none": {"mixer": "bst", "ssm": {"kernel": "none"}},
    "joint SH": {"mixer": "bst-joint", "ssm": S4D},
    "joint MF": {"mixer": "bst-joint", "ssm": S4D, "context": {"variant": "MF"}},
    "no cross": {"mixer": "bst-no-cross", "ssm": S4D},
    "transformer-xl": {"mixer": "transformer-xl", "transformer_xl": {"window": 2 * BLOCK}},
    "gss": {"mixer": "gss", "ssm": S4D},
    "ssm": {"mixer": "ssm", "ssm": S4D},
    "mamba2": {"mixer": "mamba2", "mamba2": {"state": 4, "chunk": 4, "head": 4}},
    "gated-deltanet": {"mixer": "gated-deltanet", "gated_deltanet": {"chunk": 4}},
    "full": {"mixer": "full"},
}
# Two documents begin in one chunk; documents of one token, of two, and of several blocks; one that continues the past.
BORDERS = [[5, 6, 8, 9, 22], [0, 1, 18, 19, 23]]
LENGTH = 3 * BLOCK


def model(**settings) -> LanguageModel:
    torch.manual_seed(0)
    attention_ = {"buckets": 6, "max_distance": 6} | settings.pop("attention", {})
    built = LanguageModel(
        ModelConfig(
            width=16, heads=2, ffn=24, block=BLOCK, depth=1, vocab_size=VOCABULARY, attention=attention_, **settings
        )
    ).double()
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if name.endswith("bias.weight"):
                parameter.normal_()  # the T5 bias, which is initialised with 0
    return built


def begins(borders: list[list[int]], length: int) -> Tensor:
    found = torch.zeros(len(borders), length, dtype=torch.bool)
    for row, places in enumerate(borders):
        found[row, places] = True
    return found


def batch(length: int = LENGTH, rows: int = 2, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (rows, length + 1), generator=generator)
    return ids[:, :-1], ids[:, 1:]


class Remembered(EarlierCall):
    """An earlier call that does not detach: gradients flow through it."""

    def leave(self, name: str, value: Tensor) -> None:
        self.after[self._prefix + name] = value


def alone(of: LanguageModel, ids: Tensor, labels: Tensor, position: int) -> Tensor:
    """Return the losses of one document (1, n), token by token; `position`: of its first token within a block."""
    state, found = {}, []
    for place in range(ids.shape[1]):
        past = Remembered(state, position + place)
        found.append(losses(of, ids[:, place : place + 1], labels[:, place : place + 1], past=past))
        state = past.after
    return torch.cat(found, dim=1)


def losses(of: LanguageModel, ids: Tensor, labels: Tensor, **how) -> Tensor:
    """Return the loss of each token, (B, l), with gradient."""
    logits = of.logits(of.hidden(ids, **how))
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")


def documents_alone(of: LanguageModel, ids: Tensor, labels: Tensor, begins: Tensor) -> Tensor:
    """Return the losses (B, l) with every document of every row computed alone."""
    rows = []
    for row, own in enumerate(begins):
        edges = sorted({0, *own.nonzero().flatten().tolist(), len(own)})
        parts = [(slice(row, row + 1), slice(a, b)) for a, b in pairwise(edges)]
        rows.append(torch.cat([alone(of, ids[at], labels[at], at[1].start % BLOCK) for at in parts], dim=1))
    return torch.cat(rows)


def gradients(of: LanguageModel, loss: Tensor) -> dict[str, Tensor]:
    of.zero_grad()
    (loss * torch.linspace(1, 2, loss.numel()).view_as(loss)).sum().backward()
    return {name: p.grad for name, p in of.named_parameters() if p.grad is not None}


def require_equal(found: tuple, expected: tuple, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=tolerance, atol=tolerance)
    wanted = expected[1]
    for name, gradient in found[1].items():
        torch.testing.assert_close(
            gradient,
            wanted.get(name, torch.zeros_like(gradient)),
            rtol=100 * tolerance,
            atol=100 * tolerance,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@pytest.mark.parametrize("name", MODELS)
def test_a_masked_document_equals_the_document_alone(name: str) -> None:
    """Losses and the gradients of all parameters are equal.

    Documents begin within a chunk, at a chunk, at a block, and at consecutive tokens.
    """
    of, (ids, labels), at = model(**MODELS[name]), batch(), begins(BORDERS, LENGTH)
    together, apart = losses(of, ids, labels, starts=Borders.of(at)), documents_alone(of, ids, labels, at)
    if name == "transformer-xl":  # token by token, no gradient flows between tokens
        torch.testing.assert_close(together, apart)
    else:
        require_equal((together, gradients(of, together)), (apart, gradients(of, apart)))


@pytest.mark.parametrize("name", MODELS)
def test_tokens_of_other_documents_have_no_effect(name: str) -> None:
    """Neither tokens before the document nor tokens after it, in fp32."""
    of, (ids, _), starts = model(**MODELS[name]).float(), batch(), Borders.of(begins(BORDERS, LENGTH))
    own = torch.zeros(LENGTH, dtype=torch.bool)
    own[9:22] = True  # a document that begins within a chunk and spans two block ends
    others = torch.where(own, ids[0], (ids[0] + 5) % VOCABULARY)
    before, after = (of.hidden(rows, starts=starts)[0, own] for rows in (ids, torch.stack((others, ids[1]))))
    assert torch.equal(before, after)
    assert not torch.equal(of.hidden(ids)[0, own], before)


@pytest.mark.parametrize("name", ["rope", "SH", "MF", "SH ssd", "transformer-xl", "gated-deltanet", "full"])
def test_slices_with_a_carried_past_equal_the_whole(name: str) -> None:
    """Gradients flow across slices; documents span several slices, or several begin in the window before a slice."""
    of, (ids, labels), at = model(**MODELS[name]), batch(), begins([[5, 6, 7], [2, 15]], LENGTH)
    whole = losses(of, ids, labels, starts=Borders.of(at))
    state, found = {}, []
    for first in range(0, LENGTH, BLOCK):
        past, here = Remembered(state, first), slice(first, first + BLOCK)
        found.append(losses(of, ids[:, here], labels[:, here], starts=Borders.of(at[:, here]), past=past))
        state = past.after
    sliced = torch.cat(found, dim=1)
    if name == "transformer-xl":  # no gradient comes from an earlier segment
        torch.testing.assert_close(sliced, whole)
    else:
        require_equal((sliced, gradients(of, sliced)), (whole, gradients(of, whole)))


def test_the_table_of_borders_has_few_sizes_and_never_changes_results() -> None:
    """The size of the table of borders does not change the results; all sizes are tested."""
    of, (ids, labels) = model(**MODELS["SH"]), batch(64 * BLOCK, rows=1)
    sizes = set()
    for count in (0, 1, 2, 16, 17, 512):
        at = torch.zeros(1, 512, dtype=torch.bool)
        at[0, torch.randperm(512, generator=torch.Generator().manual_seed(count))[:count]] = True
        starts = Borders.of(at)
        sizes.add(len(starts.places))
        exact = Borders(at, at.flatten().nonzero().squeeze(1))
        torch.testing.assert_close(losses(of, ids, labels, starts=starts), losses(of, ids, labels, starts=exact))
    assert sizes == {1, 4, 16, 512}
    assert [room(borders, 32768) for borders in (64, 65, 1024, 1025)] == [64, 256, 1024, 32768]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"mixer": "block-recurrent"}, "block-recurrent updates its state once per block"),
        ({"mixer": "bst", "ssm": {"kernel": "hyena", "length": 8}}, "ssm.kernel hyena \\(bst\\) keeps its last inputs"),
        ({"mixer": "bst", "context": {"attend": "previous"}}, "context.attend previous"),
    ],
)
def test_models_that_cannot_separate_documents_are_refused_with_the_reason(settings: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        model(**settings)(batch()[0], starts=Borders.none(2, LENGTH))
    assert masking_problem(model(mixer="ssm", ssm=S4D, context={"attend": "previous"}).config) is None  # no context


def test_slices_within_a_block_are_refused() -> None:
    with pytest.raises(ValueError, match="need slices of whole blocks of 8"):
        model(mixer="sliding")(batch(4)[0], starts=Borders.none(2, 4))
