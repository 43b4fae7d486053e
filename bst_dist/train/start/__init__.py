"""Before the first step: what must be right, what a run may continue from and with which changes, where it begins."""
