"""What a corpus is on disk: shards, index, manifest, tokenizer; and how it is verified."""
