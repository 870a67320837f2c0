"""Encoders: transformers models that answer once, without padding and in CUDA graphs. Imports nothing."""
