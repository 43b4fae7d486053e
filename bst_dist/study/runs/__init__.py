"""Training the runs of a study: what they are, where they stand, who trains them, what they gave."""
