"""The decoder language model: embedding, a stack of layers, output head.

Shapes throughout: B rows, l tokens of this slice, D width, V vocabulary, W block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bst_dist.model.borders import Borders, Starts
from bst_dist.model.config import ModelConfig
from bst_dist.model.layers import Layer
from bst_dist.model.loss import OutputHead, linear_cross_entropy
from bst_dist.model.masking import masking_problem
from bst_dist.model.parametrisation import Scale
from bst_dist.model.roles import Role, Stack, matrices_of, roles_of
from bst_dist.parallel.sequence.past import EarlierCall, Past, State

LAST_GAIN = 0.5
"""Size of the last norm's gains at first; their signs are drawn. The stream begins as little more than the token's own
embedding, N(0, 1), whose product with itself is the logit √D: with one sign the model would begin by predicting that
each token repeats itself. With drawn signs that product is a sum of terms of both signs, of order one at any width, and
the first loss is ln V and an eighth of a nat. With a head of its own the first loss is the same, whatever the signs."""


class Losses(NamedTuple):
    """What a forward pass with labels returns."""

    total: Tensor
    """What is minimised, with gradient: the sum of the negative log-likelihood over unmasked tokens, in nats, and the
    model's `z_loss` times `squares`."""
    per_token: Tensor
    """(B, l), without gradient; zero where masked out."""
    correct: Tensor | None = None
    """(B, l) bool: the label counts and has the highest logit; None where a gradient is wanted."""
    squares: Tensor | None = None
    """Sum over unmasked tokens of log^2 Z, Z the sum of the exponentials of a token's logits, without gradient; None
    where the model's `z_loss` is 0 or no gradient is wanted."""

    @property
    def nats(self) -> Tensor:
        """Sum of the negative log-likelihood over unmasked tokens, without gradient."""
        return self.per_token.sum()


class LanguageModel(nn.Module):
    """Block-State Transformer or one of its baselines, as a language model."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        if config.vocab_size is None:
            raise ValueError("vocab_size is not known: take it from the corpus before building the model")
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)  # N(0, 1)
        branch = config.parametrisation.branch(config.depth)
        self.layers = nn.ModuleList(Layer(mixer, config, branch) for mixer in config.mixers())
        self.norm = nn.RMSNorm(config.width, eps=1e-6)
        self.checkpoint: Callable[..., Tensor] | None = None
        """Activation checkpointing: called as ``checkpoint(layer, *inputs)`` in place of ``layer(*inputs)``."""
        self.z_loss = 0.0
        """In training, what the square of log Z is weighted by in `Losses.total` (`train.z_loss`)."""
        for layer in self.layers:
            layer.initialize(config.parametrisation.initial_depth(config.depth))
        with torch.no_grad():
            self.norm.weight.copy_(LAST_GAIN * (2 * torch.randint(2, self.norm.weight.shape) - 1))
        self.output = None if config.tied else OutputHead(config.vocab_size, config.width)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        starts: Starts | None = None,
        past: Past | None = None,
    ) -> Losses | Tensor:
        """Losses of the labels; without labels, the logits of the last token, (B, V).

        Args:
            input_ids: (B, l) int64. A slice is a whole number of blocks, or lies within one block.
            labels: (B, l) int64, the token after each.
            loss_mask: (B, l) bool, False where a label does not count; None: all count.
            starts: (B, l / W) bool, blocks that begin a document and see nothing before; or `Borders`, documents that
                begin at any token, for slices of whole blocks; None: none does.
            past: what came before the slice; None: nothing.
        """
        x = self.hidden(input_ids, starts, past)
        if labels is None:
            return self.logits(x[:, -1])
        mask = torch.ones_like(labels, dtype=torch.bool) if loss_mask is None else loss_mask
        scale = self.config.parametrisation.logit_scale(self.config.width)
        if self.output is not None:
            return Losses(*self.output(self.norm(x), scale, labels, mask, self.z_loss))
        return Losses(*linear_cross_entropy(self.norm(x), self.embedding.weight, labels, mask, scale, self.z_loss))

    def hidden(self, input_ids: Tensor, starts: Starts | None = None, past: Past | None = None) -> Tensor:
        """The residual stream after the last layer, (B, l) -> (B, l, D); arguments as of `forward`."""
        past = past or Past()
        self._check_slice(input_ids.shape[1], past.position)
        if isinstance(starts, Borders):
            self._check_borders(input_ids.shape[1], past.position)
        x = self.embedding(input_ids)  # (B, l, D)
        for index, layer in enumerate(self.layers):
            inputs = (x, past.child(str(index)), starts)
            x = layer(*inputs) if self.checkpoint is None else self.checkpoint(layer, *inputs)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """Of the token after each, (..., D) -> (..., V); for few positions at a time, losses need none."""
        scale = self.config.parametrisation.logit_scale(self.config.width)
        if self.output is not None:
            return self.output(self.norm(hidden), scale)
        return self.norm(hidden) @ self.embedding.weight.T * scale

    @property
    def head_matrix(self) -> Tensor:
        """What the normalised stream is multiplied by for the logits, (V, D): the embedding, or the head's own."""
        return self.embedding.weight if self.output is None else self.output.weight

    def carry(self, state: State | None = None, position: int = 0) -> EarlierCall:
        """A past that takes up what an earlier call left, and collects in ``.after`` what the next call leaves."""
        return EarlierCall(state, position)

    def parameter_groups(self, hidden_apart: bool = False) -> dict[str, list[nn.Parameter]]:
        """Parameters by how they are trained: matrices (with weight decay), SSM dynamics (a rate of their own, no
        decay), and all the rest, called vectors (no decay): scales, biases, tables, read-outs, embedding, head. Which a
        parameter is, its module says (`bst_dist.model.roles`).

        CompleteP tells two more apart: filters, the matrices of a kernel, whose fan-in does not grow with the width,
        and embedding, the parameters outside of the layers.

        `hidden_apart`: only `hidden_matrices` are in the group of matrices, and all others in one called other
        matrices."""
        groups: dict[str, list[nn.Parameter]] = {"matrices": [], "vectors": [], "ssm": []}
        in_layers = {id(p) for p in self.layers.parameters()}
        for module in self.modules():
            for name, role in roles_of(module).items():
                parameter = getattr(module, name)
                outside = role is Role.VECTOR and id(parameter) not in in_layers
                kind = "embedding" if outside else role.value
                groups.setdefault(self.config.parametrisation.group(kind), []).append(parameter)
        if hidden_apart:
            hidden = {id(parameter) for parameter, _ in self.hidden_matrices()}
            every = groups["matrices"]
            groups["matrices"] = [parameter for parameter in every if id(parameter) in hidden]
            groups["other matrices"] = [parameter for parameter in every if id(parameter) not in hidden]
        return groups

    def hidden_matrices(self) -> list[tuple[nn.Parameter, Stack]]:
        """The matrices inside the layers, which map one activation to another, with the maps that each holds. Not among
        them: embedding and head, and the small networks that compute a kernel."""
        return list(matrices_of(self.layers))

    def group_scales(self) -> dict[str, Scale]:
        """What the optimizer's hyperparameters are multiplied by, by group; all others are as the recipe says."""
        return self.config.parametrisation.scales(self.config.width, self.config.depth)

    def _check_slice(self, length: int, position: int) -> None:
        block = self.config.block
        offset = position % block
        if (offset or length % block) and offset + length > block:
            raise ValueError(
                f"a slice of {length} tokens at position {position} is neither whole blocks of {block} nor within one"
            )

    def _check_borders(self, length: int, position: int) -> None:
        if problem := masking_problem(self.config):
            raise ValueError(problem)
        if position % self.config.block or length % self.config.block:
            raise ValueError(f"documents that begin at any token need slices of whole blocks of {self.config.block}")
