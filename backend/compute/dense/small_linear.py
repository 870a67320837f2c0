"""Matrix products with norm, bias, gate and residual: launches small_kernels.py for few tokens, else the library's.

Which of the two, and in what programs, is shape.py's business.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from backend.compute.dense import packed, packed_shape
from backend.compute.dense.base import Norm, known
from backend.compute.dense.gate import gated
from backend.compute.dense.norm import normed
from backend.compute.dense.shape import Shape, shape
from backend.compute.dense.small_kernels import join_kernel, matrix_kernel, vector_kernel
from backend.compute.quantized.packed import Packed

SMALL = 16
MOST = 32
"""Tokens that by_shape takes. Beyond SMALL nothing has been measured yet that would be better than the library."""


def few(weight: Tensor | Packed) -> int:
    """See base.Ops."""
    return packed_shape.TILED if isinstance(weight, Packed) else SMALL


def linear(
    x: Tensor,
    weight: Tensor | Packed,
    bias: Tensor | None,
    residual: Tensor | None,
    norm: Norm | None,
    activation: str | None,
) -> Tensor:
    """See base.Ops."""
    if isinstance(weight, Packed):
        return packed.linear(x, weight, bias, residual, norm, activation)
    tokens, width = x.shape
    outputs = len(weight) // 2 if activation is not None else len(weight)
    chosen = shape(tokens, outputs, width, activation is not None, x.element_size()) if tokens <= SMALL else None
    if chosen is None:
        return by_library(x, weight, bias, residual, norm, activation)
    if norm is not None and tokens > 1 and not chosen.takes_norm:
        x, norm = normed(x, None, *norm), None
    return by_shape(chosen, x, weight, bias, residual, norm, activation)


def product(x: Tensor, weight: Tensor | Packed, bias: Tensor | None) -> Tensor:
    """See base.Ops."""
    return packed.product(x, weight, bias) if isinstance(weight, Packed) else F.linear(x, weight, bias)


def by_library(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, norm: Norm | None, activation: str | None
) -> Tensor:
    """The same with torch's product, which is cuBLAS'; it may round between its steps."""
    if norm is not None:
        x = normed(x, None, *norm)
    if residual is not None and bias is None and activation is None:
        return residual.addmm_(x, weight.t())
    product = F.linear(x, weight, bias)
    if activation is not None:
        product = gated(product, activation)
    return product if residual is None else residual.add_(product)


def by_shape(
    chosen: Shape,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    norm: Norm | None,
    activation: str | None,
) -> Tensor:
    """The same in programs of this shape."""
    tokens, width = x.shape
    assert x.is_contiguous() and weight.is_contiguous() and weight.shape[1] == width and tokens <= MOST
    if norm is not None and tokens > 1 and x.dtype == torch.float16:
        x, norm = normed(x, None, *norm), None  # x * weight, not yet scaled, can leave float16's range
    outputs = len(weight) if activation is None else len(weight) // 2
    result = torch.empty(tokens, outputs, dtype=x.dtype, device=x.device) if residual is None else residual
    assert result.is_contiguous() and result.shape == (tokens, outputs)
    gain, eps = norm or (None, 0.0)
    kind = "" if activation is None else known(activation)
    programs = -(-outputs // chosen.rows)
    if tokens == 1:
        vector_kernel[(programs,)](
            result, x, weight, bias, residual, gain, eps, outputs,
            WIDTH=width, ROWS=chosen.rows, COLUMNS=chosen.columns, STAGES=chosen.stages, ACTIVATION=kind,
            num_warps=chosen.warps,
        )  # fmt: skip
        return result
    sums = squares = None
    if chosen.splits > 1:
        sums = torch.empty(chosen.splits, tokens, len(weight), dtype=torch.float32, device=x.device)
        squares = torch.empty(chosen.splits, tokens, dtype=torch.float32, device=x.device) if norm else None
    matrix_kernel[(programs, chosen.splits)](
        result, sums, squares, x, weight, bias, residual, gain, eps, outputs, tokens,
        WIDTH=width, ROWS=chosen.rows, COLUMNS=chosen.columns, STAGES=chosen.stages, SPLITS=chosen.splits,
        ACTIVATION=kind, PRECISION="ieee" if x.dtype == torch.float32 else "tf32", TOKENS=16 if tokens <= 16 else MOST,
        num_warps=chosen.warps,
    )  # fmt: skip
    if chosen.splits > 1:
        join_kernel[(triton.cdiv(outputs, 512), tokens)](
            result, sums, squares, bias, residual, eps, outputs,
            WIDTH=width, SPLITS=chosen.splits, ACTIVATION=kind, BLOCK=512,
        )  # fmt: skip
    return result
