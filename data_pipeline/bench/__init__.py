"""Benchmarks of the reader: against other packages (`bst bench data`), and by corpus size (`bst bench index`)."""
