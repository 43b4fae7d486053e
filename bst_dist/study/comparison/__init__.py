"""Comparison of runs: recipes, results and losses on the same text."""
