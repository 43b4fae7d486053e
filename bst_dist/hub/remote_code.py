"""Lies beside an exported model, where transformers looks for it under `trust_remote_code`; the code is bst_dist's."""

from bst_dist.hub.configuration import BSTConfig
from bst_dist.hub.modeling import BSTForCausalLM
from bst_dist.hub.tokenization import BSTTokenizer

__all__ = ["BSTConfig", "BSTForCausalLM", "BSTTokenizer"]
