"""Benchmarks. Each compares with another implementation or with an exact count."""
