"""The data order: which tokens each row of a step reads, a pure function of the corpus sizes, the seed and the step."""
