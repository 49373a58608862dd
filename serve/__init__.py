"""Serving: continuous batching over a paged cache, an OpenAI-compatible server, a terminal chat and a benchmark."""
