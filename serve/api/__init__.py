"""The OpenAI-compatible HTTP side: bodies, errors, streaming, and running it."""
