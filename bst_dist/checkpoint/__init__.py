"""Checkpoints: their format, saving in the background, loading at any layout, retention, and `bst ckpt`."""
