"""The dense arithmetic of a decoder layer. Imports nothing, so that a machine without Triton can import any part."""
