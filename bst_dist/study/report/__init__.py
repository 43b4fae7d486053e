"""Documents and figures of studies, in one style."""
