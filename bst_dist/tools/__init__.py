"""Tools around the core: benchmarks, `bst doctor` and `bst demo`."""
