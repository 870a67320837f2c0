"""Weights that a checkpoint holds quantized already: their codes read as Packed, and which layers get them."""
