"""Small controlled experiments: a base recipe, named arms, seeds, what is measured afterwards, one table."""
