"""Drawing tokens from logits. Imports nothing, so that a machine without Triton can import any part."""
