"""Export of runs as Hugging Face models, and import.

Importing this package registers exported models with the `Auto` classes of transformers, so that they load without
`trust_remote_code`.
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from bst_dist.hub.bundle import write_code
from bst_dist.hub.modeling import BSTCache, BSTConfig, BSTForCausalLM
from bst_dist.hub.tokenization import BSTTokenizer

__all__ = ["BSTCache", "BSTConfig", "BSTForCausalLM", "BSTTokenizer"]

BSTConfig.write_code = staticmethod(write_code)
AutoConfig.register(BSTConfig.model_type, BSTConfig)
AutoModelForCausalLM.register(BSTConfig, BSTForCausalLM)
AutoTokenizer.register(BSTConfig, tokenizer_class=BSTTokenizer)
