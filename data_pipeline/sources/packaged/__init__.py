"""Named corpora of real text that package registries carry, for demonstrations where the large public ones are out of
reach: books, LaTeX, formal mathematics, the Linux source."""
