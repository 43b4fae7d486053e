"""Rows of tokens at different positions, which a model reads in as few forward passes as the layers allow.

A layer needs two things of a row's past: the row's position within its block, and the state it has left. Rows with the
same position and the same shapes of state form a group and are one batch, however many tokens each has read. Groups
split when rows read different numbers of tokens, and join again when their states have the same shapes.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bst_dist.model.config import within_block
from bst_dist.model.lm import LanguageModel
from bst_dist.parallel.sequence.past import State

BLOCKS_AT_ONCE = 16
"""Maximum number of blocks of a row in one forward pass; it bounds the memory of a long prompt."""


@dataclass
class _Group:
    """Rows in one batch."""

    rows: list[int]
    positions: list[int]
    """Number of tokens that each row has read; all are equal modulo the block."""
    state: State

    def part(self, members: list[int]) -> _Group:
        """Return a group of some of the rows, given by their indices in the batch."""
        if members == list(range(len(self.rows))):
            return self
        return _Group(
            [self.rows[i] for i in members],
            [self.positions[i] for i in members],
            {name: tensor[members] for name, tensor in self.state.items()},
        )

    def kind(self, block: int) -> Hashable:
        """Return a key; groups with equal keys can be one batch."""
        shapes = tuple(sorted((name, tensor.shape[1:], tensor.dtype) for name, tensor in self.state.items()))
        return self.positions[0] % block, shapes


class Rows:
    """The states of rows. Reading continues from them."""

    def __init__(self, count: int) -> None:
        """Make `count` rows that have read nothing."""
        self._groups = [_Group(list(range(count)), [0] * count, {})] if count else []

    @property
    def positions(self) -> list[int]:
        """Number of tokens that each row has read."""
        found = {row: at for group in self._groups for row, at in zip(group.rows, group.positions, strict=True)}
        return [found[row] for row in sorted(found)]

    @property
    def state_bytes(self) -> int:
        """Bytes of the states of all rows."""
        return sum(tensor.nbytes for group in self._groups for tensor in group.state.values())

    def read(self, model: LanguageModel, tokens: Sequence[Tensor], every: bool = False) -> list[Tensor]:
        """Read (n,) more tokens of each row. Return the hidden state of the last, (D,), or of all if `every`, (n, D).

        A row without new tokens does not change; its result is empty, (0, D).
        """
        hidden = [model.embedding.weight.new_empty(0, model.config.width)] * len(tokens)
        groups = []
        for group in self._groups:
            for part in _split(group, [len(tokens[row]) for row in group.rows]):
                if len(tokens[part.rows[0]]):
                    read = _advance(model, part, torch.stack([tokens[row] for row in part.rows]), every)
                    for row, states in zip(part.rows, read.unbind(0), strict=True):
                        hidden[row] = states
                groups.append(part)
        self._groups = _joined(groups, model.config.block)
        return hidden

    def select(self, origins: Sequence[int]) -> None:
        """Let row i continue from the state of row origins[i]. So rows are reordered, repeated, or dropped."""
        groups = []
        for group in self._groups:
            members = {row: place for place, row in enumerate(group.rows)}
            new = [row for row, origin in enumerate(origins) if origin in members]
            if new:
                part = group.part([members[origins[row]] for row in new])
                groups.append(_Group(new, part.positions, part.state))
        self._groups = groups


def portions(position: int, count: int, block: int, chunk: int) -> Iterator[int]:
    """Yield the lengths of slices in which a model can read `count` tokens from `position` on.

    A slice is whole blocks that begin at a block's boundary, or lies within one block. Within a block, it is a multiple
    of the SSM's chunk or shorter than a chunk. `chunk`: at most a block.
    """
    while count:
        left = block - position % block
        if left == block and count >= block:
            length = min(count // block, BLOCKS_AT_ONCE) * block
        else:
            length = min(count, left)
            length -= length % chunk if length > chunk else 0
        yield length
        position += length
        count -= length


def _advance(model: LanguageModel, group: _Group, ids: Tensor, every: bool) -> Tensor:
    """Read the next `ids` (b, n) of a group. Return the hidden states, (b, n, D) if `every`, else the last, (b, D)."""
    ids = ids.to(model.embedding.weight.device)
    config, read, at = model.config, [], 0
    chunk = within_block(config.ssm, config.block).chunk
    for length in portions(group.positions[0], ids.shape[1], config.block, chunk):
        past = model.carry(group.state, max(group.positions))
        x = model.hidden(ids[:, at : at + length], past=past)
        read = [*read, x] if every else [x[:, -1]]
        group.state, at = past.after, at + length
        group.positions = [position + length for position in group.positions]
    return torch.cat(read, dim=1) if every else read[0]


def _split(group: _Group, counts: list[int]) -> Iterator[_Group]:
    """Yield the group's rows, grouped by the number of tokens that they read."""
    for count in sorted(set(counts)):
        yield group.part([place for place, own in enumerate(counts) if own == count])


def _joined(groups: list[_Group], block: int) -> list[_Group]:
    """Join all groups of the same kind."""
    if len(groups) < 2:
        return groups
    kinds: dict[Hashable, list[_Group]] = {}
    for group in groups:
        kinds.setdefault(group.kind(block), []).append(group)
    return [_join(alike) for alike in kinds.values()]


def _join(groups: list[_Group]) -> _Group:
    if len(groups) == 1:
        return groups[0]
    state = {name: torch.cat([group.state[name] for group in groups]) for name in groups[0].state}
    return _Group([row for g in groups for row in g.rows], [at for g in groups for at in g.positions], state)
