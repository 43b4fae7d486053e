"""Small controlled experiments: a base recipe, named arms, seeds, measurements and one table."""
