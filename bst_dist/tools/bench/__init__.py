"""Benchmarks, each against a peer or an exact count."""
