"""The stack of layers as a classifier of one sequence, or of two sequences that are compared.

The layers are causal, as in a language model, unlike the published encoders. With mean pooling the class is read from
all positions, of which the last ones have seen the whole sequence. Padding follows a sequence, so causal layers do not
see it, and pooling excludes it: padding has no effect.

Shapes: B examples, s sequences per example (2 if they are compared), l tokens, D width, C classes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bst_dist.model.config import ModelConfig
from bst_dist.model.lm import LanguageModel
from bst_dist.model.roles import Linear
from bst_dist.parallel.sequence.past import Past
from bst_dist.study.lra.config import LongRangeConfig
from bst_dist.study.lra.tasks import TASKS

PADDING = 0


class Classified(NamedTuple):
    """The result of a forward pass with labels."""

    total: Tensor
    """Sum of the negative log-likelihood over the unmasked examples, in nats, with gradient."""
    per_example: Tensor
    """(B,) negative log-likelihood in nats, without gradient; zero for masked examples."""
    correct: Tensor
    """(B,) bool: whether the most likely class is the right one; False for masked examples."""

    @property
    def nats(self) -> Tensor:
        """The total without gradient."""
        return self.total.detach()


class Classifier(LanguageModel):
    """The layers of a language model with a classification head. The head does not share the embedding."""

    def __init__(self, config: ModelConfig, data: LongRangeConfig):
        super().__init__(config)
        self.task, self.pooling = TASKS[data.task], data.pooling
        width = config.width
        if self.task.sequences == 1:
            self.head: nn.Module = Linear(width, self.task.classes, bias=True)
        else:  # input: both vectors, their product and their difference (arXiv 2011.04006, section 2.2.3)
            self.head = nn.Sequential(
                Linear(4 * width, config.ffn, bias=True), nn.ReLU(), Linear(config.ffn, self.task.classes, bias=True)
            )
        for module in self.head.modules():
            if isinstance(module, Linear):
                nn.init.normal_(module.weight, std=1 / math.sqrt(module.in_features))
                nn.init.zeros_(module.bias)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        starts: Tensor | None = None,
        past: Past | None = None,
    ) -> Classified | Tensor:
        """Return the losses of the labels; without labels, the logits, (B, C).

        Args:
            input_ids: (B, s l) int64, the sequences of an example one after the other, each padded at its end by zeros.
            labels: (B,) int64.
            loss_mask: (B,) bool, False for masked examples; None: no example is masked.
            starts: None, because each row is one example.
            past: the past of the sequences, which is empty.
        """
        ids = input_ids.view(len(input_ids) * self.task.sequences, -1)  # (B s, l)
        pooled = self._pool(self.norm(self.hidden(ids, starts, past)), ids != PADDING)
        logits = self.head(self._combine(pooled.view(len(input_ids), -1, pooled.shape[-1])))
        if labels is None:
            return logits
        mask = torch.ones_like(labels, dtype=torch.bool) if loss_mask is None else loss_mask
        per_example = F.cross_entropy(_wide(logits), labels, reduction="none") * mask
        return Classified(per_example.sum(), per_example.detach(), (logits.argmax(-1) == labels) & mask)

    def _pool(self, x: Tensor, valid: Tensor) -> Tensor:
        """Pool the valid positions: (B s, l, D), (B s, l) bool -> (B s, D)."""
        count = valid.sum(1, keepdim=True).clamp(min=1)
        if self.pooling == "last":
            return x.gather(1, (count - 1).unsqueeze(-1).expand(-1, -1, x.shape[-1])).squeeze(1)
        return torch.where(valid.unsqueeze(-1), _wide(x), 0.0).sum(1) / count

    def _combine(self, pooled: Tensor) -> Tensor:
        """Combine the sequences of an example: (B, s, D) -> (B, D), or (B, 4 D) for two sequences."""
        if self.task.sequences == 1:
            return pooled.squeeze(1)
        one, other = pooled.unbind(1)
        return torch.cat((one, other, one * other, one - other), dim=-1)


def _wide(x: Tensor) -> Tensor:
    """Return `x` in at least single precision, also under autocast."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
