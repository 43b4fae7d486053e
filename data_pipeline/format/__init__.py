"""The format of a corpus on disk (shards, index, manifest, tokenizer), and how it is verified."""
