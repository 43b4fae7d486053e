"""Perplexity by length and by position."""
