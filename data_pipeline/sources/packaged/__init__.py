"""Corpora of real text from package registries: books, LaTeX, formal mathematics, the Linux source.

They are for demonstrations where the large public data sets cannot be reached.
"""
