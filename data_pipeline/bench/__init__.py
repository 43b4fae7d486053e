"""Benchmarks: this project's reader and other packages' on the same sequences (`bst bench data`), and corpora of any
size (`bst bench index`)."""
