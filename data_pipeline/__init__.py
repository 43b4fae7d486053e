"""From raw corpora to exactly resumable, sequence-sharded tokens; knows nothing of models."""
