"""RMS norm with the addition before it, as an OpenAI-Triton kernel: one program a token."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def normed(hidden: Tensor, update: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """See base.Ops."""
    assert hidden.is_contiguous() and (update is None or update.is_contiguous())
    tokens, width = hidden.shape
    output = torch.empty_like(hidden)
    block = triton.next_power_of_2(width)
    _norm_kernel[(tokens,)](
        output, hidden, update, weight, eps, WIDTH=width, BLOCK=block, num_warps=min(16, max(1, block // 512))
    )
    return output


@triton.jit
def _norm_kernel(output, hidden, update, weight, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    inside = at < WIDTH
    start = tl.program_id(0).to(tl.int64) * WIDTH
    x = tl.load(hidden + start + at, mask=inside, other=0.0)
    gain = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    if update is not None:
        more = tl.load(update + start + at, mask=inside, other=0.0)
        x = (x.to(tl.float32) + more.to(tl.float32)).to(x.dtype)
        tl.store(hidden + start + at, x, mask=inside)
    x = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 0) / WIDTH + eps)
    tl.store(output + start + at, (x * scale * gain).to(output.dtype.element_ty), mask=inside)
