"""Activation checkpointing: which layers are recomputed, and what is kept or offloaded."""
