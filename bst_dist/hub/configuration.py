"""A run's recipe as the configuration of a Hugging Face model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from bst_base.settings import parse
from bst_dist.model.config import ModelConfig

REMOTE_CODE = "bst.py"
"""The file beside a model that transformers takes its classes from under `trust_remote_code`."""


class BSTConfig(PreTrainedConfig):
    """config.json: the whole recipe of a run, and what its checkpoint says of itself."""

    model_type = "bst"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (transformers' own form)

    recipe: dict[str, Any] | None = None
    """The resolved recipe, as in a run directory."""
    checkpoint: dict[str, Any] | None = None
    """The manifest of the checkpoint, but for its files: step, tokens, validation loss, versions."""
    use_cache: bool = True
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    def settings(self) -> ModelConfig:
        """The recipe's model section; raises ConfigError for what is wrong in it."""
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
        """As transformers does, with the file that `auto_map` names."""
        self.auto_map = {"AutoConfig": "bst.BSTConfig", "AutoModelForCausalLM": "bst.BSTForCausalLM"}
        super().save_pretrained(save_directory, **kwargs)
        shutil.copyfile(Path(__file__).with_name("remote_code.py"), Path(save_directory) / REMOTE_CODE)
