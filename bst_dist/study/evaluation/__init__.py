"""Evaluation of one trained run: loss on documents, synthetic tasks, pass keys, and generated text."""
