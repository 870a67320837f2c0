"""Attention over the paged KV cache. Imports nothing, so that a machine without Triton can import any part."""
