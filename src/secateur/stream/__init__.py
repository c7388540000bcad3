"""Running models over token blocks: the one place that knows how a packed block is handed to a transformers model."""
