"""Training batches from a prepared corpus: the data order, the rows of a rank, and the loader."""
