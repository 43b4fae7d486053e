"""From a corpus to batches: the order, the rows, the loader."""
