"""The decoder language model: embedding, a stack of layers, output head.

Shapes throughout: B rows, l tokens of this slice, D width, V vocabulary, W block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bst_dist.model.config import ModelConfig
from bst_dist.model.document_mask import Borders, Starts
from bst_dist.model.layers import Layer
from bst_dist.model.loss import OutputHead, linear_cross_entropy
from bst_dist.model.masking import masking_problem
from bst_dist.model.parametrisation import Scale
from bst_dist.model.roles import Role, Stack, matrices_of, roles_of
from bst_dist.parallel.sequence.past import EarlierCall, Past, State

LAST_GAIN = 0.5
"""Initial size of the last norm's gains; their signs are random. At initialisation the residual stream is close to the
token's own embedding, N(0, 1), whose product with itself is the logit √D. If all gains had one sign, the model would
therefore begin by predicting that each token repeats itself. With random signs this product is a sum of terms of both
signs, of order one at any width, and the initial loss is ln V plus an eighth of a nat. With a separate head matrix the
initial loss is the same for any signs."""


class Losses(NamedTuple):
    """The result of a forward pass with labels."""

    total: Tensor
    """The training loss, with gradient: the sum of the negative log-likelihood over unmasked tokens, in nats, plus the
    model's `z_loss` times `squares`."""
    per_token: Tensor
    """(B, l): the negative log-likelihood of each token, without gradient; zero for masked tokens."""
    correct: Tensor | None = None
    """(B, l) bool: the label is unmasked and has the highest logit. None when gradients are computed."""
    squares: Tensor | None = None
    """Sum of log^2 Z over unmasked tokens, without gradient. Z is the sum of the exponentials of a token's logits. None
    when the model's `z_loss` is 0 or no gradients are computed."""

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
        """Weight of the squared log Z in `Losses.total` during training (`train.z_loss`)."""
        self.fused_loss = False
        """Whether the loss is compiled in training (`loss.linear_cross_entropy`)."""
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
        """Return the losses of the labels, or without labels the logits of the last token, (B, V).

        Args:
            input_ids: (B, l) int64. A slice is a whole number of blocks, or lies within one block.
            labels: (B, l) int64, the token after each input token.
            loss_mask: (B, l) bool, False for labels that are left out of the loss; None: all are included.
            starts: (B, l / W) bool, blocks that begin a document and see nothing before it; or `Borders`, for slices of
                whole blocks in which documents begin at any token; None: no document begins.
            past: the past of the slice; None: nothing came before it.
        """
        x = self.hidden(input_ids, starts, past)
        if labels is None:
            return self.logits(x[:, -1])
        mask = torch.ones_like(labels, dtype=torch.bool) if loss_mask is None else loss_mask
        scale = self.config.parametrisation.logit_scale(self.config.width)
        if self.output is not None:
            return Losses(*self.output(self.norm(x), scale, labels, mask, self.z_loss, self.fused_loss))
        inputs = self.norm(x), self.embedding.weight, labels, mask
        return Losses(*linear_cross_entropy(*inputs, scale, self.z_loss, self.fused_loss))

    def hidden(self, input_ids: Tensor, starts: Starts | None = None, past: Past | None = None) -> Tensor:
        """Return the residual stream after the last layer, (B, l) -> (B, l, D); arguments as in `forward`."""
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
        """Return the logits of the next token, (..., D) -> (..., V), for few positions; losses do not use it."""
        scale = self.config.parametrisation.logit_scale(self.config.width)
        if self.output is not None:
            return self.output(self.norm(hidden), scale)
        return self.norm(hidden) @ self.embedding.weight.T * scale

    @property
    def head_matrix(self) -> Tensor:
        """The matrix (V, D) that maps the normalised stream to logits: the embedding, or the head's own matrix."""
        return self.embedding.weight if self.output is None else self.output.weight

    def carry(self, state: State | None = None, position: int = 0) -> EarlierCall:
        """Return a past that reads `state`, left by an earlier call, and collects the next state in ``.after``."""
        return EarlierCall(state, position)

    def parameter_groups(self, hidden_apart: bool = False) -> dict[str, list[nn.Parameter]]:
        """Return the parameters by optimizer group. The role of each parameter is set in its module
        (`bst_dist.model.roles`).

        - matrices: with weight decay;
        - ssm: the dynamics of SSMs, with a separate learning rate and no decay;
        - vectors: all others (scales, biases, tables, read-outs, embedding, head), without decay.

        CompleteP has two more groups: filters, the matrices that compute a kernel, whose fan-in does not grow with the
        width; and embedding, the parameters outside the layers.

        `hidden_apart`: keep only `hidden_matrices` in "matrices" and put all other matrices into "other matrices"."""
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
        """Return the matrices in the layers that map one activation to another, each with the linear maps it holds.
        Embedding, head, and the small networks that compute a kernel are not included."""
        return list(matrices_of(self.layers))

    def group_scales(self) -> dict[str, Scale]:
        """Return the multipliers of the optimizer's hyperparameters by group. Other groups use the recipe's values."""
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
