"""The dense operations as OpenAI-Triton kernels, for CUDA; they know shapes, not models.

Nothing here reads a device value on the host, and launches depend on shapes alone: CUDA graphs may hold them.
"""

from backend.compute.dense.best import best
from backend.compute.dense.gate import gated
from backend.compute.dense.norm import normed
from backend.compute.dense.rope import roped
from backend.compute.dense.small_linear import few, linear, product

__all__ = ["best", "few", "gated", "linear", "normed", "product", "roped"]
