"""Reports of a run: metrics, performance, TensorBoard and other writers, profiles, probes of the model."""
