"""Ablations: the loss of a trained model when a part is removed or changed."""
