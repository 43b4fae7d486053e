"""The stack of layers as a classifier of one sequence, or of two that are compared.

The layers are causal, as they are in a language model; the published encoders are not. With mean pooling the class is
read from all positions, the last of which have seen everything. Padding stands behind a sequence, so no position of it
can see any, and pooling leaves it out: what stands there changes nothing.

Shapes: B examples, s sequences of each (2 where they are compared), l tokens, D width, C classes.
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
    """What a forward pass with labels returns."""

    total: Tensor
    """Sum of the negative log-likelihood over examples that count, in nats, with gradient."""
    per_example: Tensor
    """(B,), without gradient; zero where an example does not count."""
    correct: Tensor
    """(B,) bool: whether the likeliest class is the right one; False where an example does not count."""

    @property
    def nats(self) -> Tensor:
        """The total without gradient."""
        return self.total.detach()


class Classifier(LanguageModel):
    """A language model's layers with a head of classes; the embedding has no second use."""

    def __init__(self, config: ModelConfig, data: LongRangeConfig):
        super().__init__(config)
        self.task, self.pooling = TASKS[data.task], data.pooling
        width = config.width
        if self.task.sequences == 1:
            self.head: nn.Module = Linear(width, self.task.classes, bias=True)
        else:  # both, their product and difference (arXiv 2011.04006, section 2.2.3)
            self.head = nn.Sequential(Linear(4 * width, config.ffn, bias=True), nn.ReLU(),
                                      Linear(config.ffn, self.task.classes, bias=True))  # fmt: skip
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
        """Losses of the labels; without labels, the logits, (B, C).

        Args:
            input_ids: (B, s l) int64, the sequences of an example side by side, each padded at its end by zeros.
            labels: (B,) int64.
            loss_mask: (B,) bool, False where an example does not count; None: all count.
            starts: None: each row is one example.
            past: what came before: nothing.
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
        """(B s, l, D), (B s, l) bool -> (B s, D)."""
        count = valid.sum(1, keepdim=True).clamp(min=1)
        if self.pooling == "last":
            return x.gather(1, (count - 1).unsqueeze(-1).expand(-1, -1, x.shape[-1])).squeeze(1)
        return torch.where(valid.unsqueeze(-1), _wide(x), 0.0).sum(1) / count

    def _combine(self, pooled: Tensor) -> Tensor:
        """(B, s, D) -> (B, D), or (B, 4 D) where two sequences are compared."""
        if self.task.sequences == 1:
            return pooled.squeeze(1)
        one, other = pooled.unbind(1)
        return torch.cat((one, other, one * other, one - other), dim=-1)


def _wide(x: Tensor) -> Tensor:
    """At least single precision, whatever the autocast."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
