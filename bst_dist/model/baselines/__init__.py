"""Mixers that Block-State Transformers are compared with, under the same norms, feed-forward network and head."""
