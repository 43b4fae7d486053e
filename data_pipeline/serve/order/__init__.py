"""Which tokens each row of a step reads: pure functions of the sizes of a corpus, the seed and the step."""
