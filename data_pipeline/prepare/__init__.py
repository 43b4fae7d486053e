"""From documents to a corpus: text, near-duplicates, tokens, shards."""
