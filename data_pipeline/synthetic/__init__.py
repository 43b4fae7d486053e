"""Synthetic tasks: sequences that are computed instead of stored. Each tests one ability and has a known best loss."""
