"""`bst doctor`: what this machine has for training, what is missing, and how to get it.

Nothing here is imported that may be missing, and nothing is waited for without a limit: what is heavy, or talks to a
driver, is asked of a process of its own.
"""
