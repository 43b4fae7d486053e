"""Evaluation of a run's model on tasks of the lm-evaluation-harness."""
