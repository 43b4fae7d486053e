"""The language model as a Hugging Face model: logits of every token, and generation from the carried state.

A row of a batch begins where its attention mask begins. Padding on either side is never read, so rows of unequal
lengths are read as if each were alone.

Shapes: B rows, T columns of this call, n tokens of a row in it, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from bst_base.errors import UserError
from bst_base.settings import parse
from bst_dist.generation.rows import Rows
from bst_dist.model.config import ModelConfig
from bst_dist.model.lm import LanguageModel
from bst_dist.model.roles import single_precision


class BSTConfig(PreTrainedConfig):
    """config.json: the recipe of a run, and the manifest of its checkpoint."""

    model_type = "bst"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (transformers' own form)

    write_code: ClassVar[Callable[[Path], dict[str, str]] | None] = None
    """Writes the model's code next to config.json, and returns its `auto_map`. None if this code is itself such a copy;
    transformers then copies it."""

    recipe: dict[str, Any] | None = None
    """The resolved recipe, as in a run directory."""
    checkpoint: dict[str, Any] | None = None
    """The manifest of the checkpoint without its files: step, tokens, validation loss, versions."""
    use_cache: bool = True
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    def settings(self) -> ModelConfig:
        """Return the recipe's model section. Raise ConfigError if it is invalid."""
        section = (self.recipe or {}).get("model", {})
        return parse(ModelConfig, section, where="config.json: recipe.model")

    @property
    def vocab_size(self) -> int:
        return self.settings().vocab_size

    @property
    def hidden_size(self) -> int:
        return self.settings().width

    @property
    def num_hidden_layers(self) -> int:
        return self.settings().depth

    @property
    def num_attention_heads(self) -> int:
        return self.settings().heads

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Save as transformers does, together with the code that loads the model without this project installed."""
        if write_code := type(self).write_code:
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            self.auto_map = write_code(Path(save_directory))
        super().save_pretrained(save_directory, **kwargs)


class BSTCache:
    """The state of each row: for each layer a window of keys and values, and the state of its SSM."""

    is_compileable = False

    def __init__(self, rows: int) -> None:
        """Make the cache of `rows` rows that have read nothing."""
        self.rows = Rows(rows)
        self.columns = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of columns read so far, including padding."""
        return self.columns

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row i continue from the state of row beam_idx[i]."""
        self.rows.select(beam_idx.tolist())

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times."""
        self.rows.select([row for row in range(len(self.rows.positions)) for _ in range(repeats)])


class BSTForCausalLM(PreTrainedModel, GenerationMixin):
    """A trained language model of this project, with any mixers.

    Parameters are in single precision for any `dtype`, as in training, because SSM dynamics need it. With
    ``dtype=torch.bfloat16`` matrix products are computed in bfloat16, by autocast, as in a run of train.precision bf16.
    """

    config_class = BSTConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _is_stateful = True
    _no_split_modules = ["Layer"]  # noqa: RUF012 (transformers' own form)
    _keep_in_fp32_modules_strict = {"model"}  # noqa: RUF012

    def __init__(self, config: BSTConfig) -> None:
        super().__init__(config)
        self.model = LanguageModel(config.settings())
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """Load as transformers does, but raise UserError if weights are missing, unknown, or of another shape."""
        kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        model, info = super().from_pretrained(*args, **kwargs)
        for wrong, keys in (
            ("missing", "missing_keys"),
            ("of another shape", "mismatched_keys"),
            ("not of this model", "unexpected_keys"),
        ):
            if found := sorted(key if isinstance(key, str) else key[0] for key in info[keys]):
                raise UserError(f"{args[0]}: {len(found)} weights are {wrong}, {found[0]} the first: export it again")
        return (model, info) if output_loading_info else model

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing: the language model initialises itself."""

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.embedding

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: BSTCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return the logits of the next tokens, (B, T, V), and the mean loss of the labels, if they are given.

        Args:
            input_ids: (B, T).
            attention_mask: (B, at least T), zero for padding before or after a row's tokens; columns of earlier calls
                come first.
            past_key_values: the cache that an earlier call with `use_cache` returned; it is updated in place.
            labels: (B, T), the inputs themselves; -100 for tokens that are left out of the loss. A token after padding
                is left out too, because nothing predicts it.
            logits_to_keep: return logits of this many last columns, or of these columns; 0: of all columns. A column of
                padding has the logits of the nearest token of its row.

        Raise ValueError if hidden states or attentions are asked for, dynamics were cast to 16 bits, or labels are
        given together with `logits_to_keep`: the models of transformers fail there too, with an error about sizes.
        """
        if labels is not None and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            raise ValueError("labels: the loss needs the logits of all columns: leave logits_to_keep out")
        self._require_possible(kwargs)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        runs = _Runs(input_ids, attention_mask)
        with self._precision():
            if use_cache or past_key_values is not None:
                past_key_values = past_key_values or BSTCache(len(input_ids))
                last = isinstance(logits_to_keep, int) and logits_to_keep == 1
                hidden = self._read(runs, past_key_values, last)
            else:
                hidden = self._at_once(runs)
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.model.logits(hidden[:, kept])
        loss = None
        if labels is not None:
            labels = labels.masked_fill(runs.first_columns(), -100)
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values if use_cache else None)

    def _require_possible(self, asked: dict[str, Any]) -> None:
        for name in ("output_hidden_states", "output_attentions"):
            if asked.get(name, getattr(self.config, name)):
                raise ValueError(f"{name}: this model returns logits, a loss and its cache only: leave it out")
        if self.model.embedding.weight.dtype.itemsize >= 4:  # else the whole model was cast
            return
        for name, parameter in single_precision(self.model).items():
            if parameter.dtype.itemsize < 4:
                raise ValueError(
                    f"model.{name} is {parameter.dtype}, but needs single precision: in place of model.to(dtype) load "
                    f"with from_pretrained(…, dtype={parameter.dtype}), which computes only matrix products in it"
                )

    def _precision(self) -> Any:
        low = self.config.dtype in (torch.bfloat16, torch.float16)
        return torch.autocast(self.device.type, self.config.dtype) if low else nullcontext()

    def _read(self, runs: _Runs, cache: BSTCache, last: bool) -> Tensor:
        """Read the next tokens of each row. Return hidden states of all columns (B, T, D), or of the last (B, 1, D)."""
        cache.columns += runs.columns
        tokens = runs.tokens()
        hidden = cache.rows.read(self.model, tokens, every=not last)
        if last:
            return torch.stack(hidden).unsqueeze(1)
        longest = max(len(states) for states in hidden)
        return runs.spread(torch.stack([nn.functional.pad(x, (0, 0, 0, longest - len(x))) for x in hidden]))

    def _at_once(self, runs: _Runs) -> Tensor:
        """Read all rows from their beginning in one pass, right-padded to whole blocks: (B, T, D)."""
        tokens = runs.tokens()
        length = max(len(row) for row in tokens)
        length += -length % self.model.config.block
        ids = torch.stack([nn.functional.pad(row, (0, length - len(row))) for row in tokens])
        return runs.spread(self.model.hidden(ids))


class _Runs:
    """The columns of each row's tokens."""

    def __init__(self, ids: Tensor, mask: Tensor | None) -> None:
        self.ids, self.columns = ids, ids.shape[1]
        if mask is not None and mask.dim() != 2:
            raise ValueError(f"attention_mask must be (rows, columns), not {tuple(mask.shape)}")
        seen = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask[:, -self.columns :].bool()
        self.first = seen.int().argmax(dim=1)
        self.counts = seen.sum(dim=1)
        if mask is not None:
            column = torch.arange(self.columns, device=ids.device)
            whole = (column >= self.first[:, None]) & (column < (self.first + self.counts)[:, None])
            if not torch.equal(seen, whole):
                raise ValueError("attention_mask hides tokens between others: padding must be at the ends of a row")
            if not self.counts.all():
                raise ValueError("attention_mask hides all tokens of a row: each needs one to begin with")

    def first_columns(self) -> Tensor:
        """Return which columns hold the first token of their row in this call, (B, T) bool."""
        return torch.arange(self.columns, device=self.ids.device) == self.first[:, None]

    def tokens(self) -> list[Tensor]:
        """Return the tokens of each row, (n,)."""
        places = zip(self.ids, self.first.tolist(), self.counts.tolist(), strict=True)
        return [row[first : first + count] for row, first, count in places]

    def spread(self, hidden: Tensor) -> Tensor:
        """Move hidden states of left-aligned rows to their columns: (B, l, D) -> (B, T, D).

        A column of padding gets the hidden state of the nearest token.
        """
        column = torch.arange(self.columns, device=hidden.device) - self.first[:, None]
        place = torch.minimum(column.clamp(min=0), self.counts[:, None] - 1)  # (B, T)
        return hidden.gather(1, place.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
