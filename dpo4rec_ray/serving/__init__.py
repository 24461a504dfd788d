"""Serving a published version over HTTP with Ray Serve."""
