"""The runs of a study: their recipes, status, training and results."""
