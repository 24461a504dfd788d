"""Model files as they are published, and as the loaders want them."""
