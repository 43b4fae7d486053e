"""Local copies: the newest states of a run, in the memory of its nodes."""
