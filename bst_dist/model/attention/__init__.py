"""Block-local self-attention and its implementations. Attention to context states is in `context`."""
