"""The target LLM: one plain decoder that can be cut at any layer."""
