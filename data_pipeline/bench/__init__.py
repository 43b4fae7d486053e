"""This project's reader and its peers on the same sequences (`bst bench data`); corpora of any size (`bench index`)."""
