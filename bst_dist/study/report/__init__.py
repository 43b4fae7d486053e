"""Documents and figures of a study, in one style."""
