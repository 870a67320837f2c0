"""Weights in 4 or 8 bits: what they are, how they are made from full ones, and the layers that hold them."""
