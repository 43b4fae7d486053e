"""Access to a corpus's files: local files, HTTP, object stores, and a cache of them."""
