"""Activation checkpointing: which layers are run again, and what is kept or offloaded instead."""
