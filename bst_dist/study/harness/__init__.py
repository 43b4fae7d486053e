"""Tasks of the lm-evaluation-harness on a run's model."""
