"""Where shards lie: local files, HTTP, object stores, and a cache of them."""
