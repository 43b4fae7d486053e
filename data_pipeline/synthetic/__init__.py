"""Sequences that are computed and not stored: tasks that each ask for one ability, with a known best answer."""
