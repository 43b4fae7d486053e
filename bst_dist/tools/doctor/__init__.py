"""`bst doctor`: what this machine has for training, what is missing, and how to get it.

No module is imported here that may be missing, and every wait has a time limit. Checks that are heavy or talk to a
driver run in a separate process.
"""
