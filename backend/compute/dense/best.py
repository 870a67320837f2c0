"""The greatest logit of each row and its lowest index, as two OpenAI-Triton kernels: many programs a row, then one.

NaN counts as greater than anything, as in torch.max.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

NOWHERE = tl.constexpr(2**31 - 1)


def best(logits: Tensor) -> tuple[Tensor, Tensor]:
    """See base.Ops."""
    assert logits.is_contiguous()
    tokens, width = logits.shape
    block = 1024 if tokens <= 8 else 4096  # few rows: more programs than the device has processors
    parts = triton.cdiv(width, block)
    values = torch.empty(tokens, parts, dtype=torch.float32, device=logits.device)
    ids = torch.empty(tokens, parts, dtype=torch.int32, device=logits.device)
    _part_kernel[(tokens, parts)](values, ids, logits, width, BLOCK=block)
    value = torch.empty(tokens, dtype=torch.float32, device=logits.device)
    index = torch.empty(tokens, dtype=torch.int64, device=logits.device)
    _whole_kernel[(tokens,)](value, index, values, ids, parts, BLOCK=triton.next_power_of_2(parts))
    return value, index


@triton.jit
def _part_kernel(values, ids, logits, width, BLOCK: tl.constexpr):
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = part * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    x = tl.load(logits + token * width + at, mask=inside, other=float("-inf")).to(tl.float32)
    value, index = _top(x, tl.where(inside, at, NOWHERE))
    where = token * tl.num_programs(1) + part
    tl.store(values + where, value)
    tl.store(ids + where, index)


@triton.jit
def _whole_kernel(value, index, values, ids, parts, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    x = tl.load(values + token * parts + at, mask=at < parts, other=float("-inf"))
    top, where = _top(x, tl.load(ids + token * parts + at, mask=at < parts, other=NOWHERE))
    tl.store(value + token, top)
    tl.store(index + token, where.to(tl.int64))


@triton.jit
def _top(x, at):
    """float32 [n] and int32 [n] -> the greatest and the lowest index of those equal to it."""
    broken = x != x
    top = tl.max(tl.where(broken, float("-inf"), x), 0)
    index = tl.min(tl.where(x == top, at, NOWHERE), 0)
    first_broken = tl.min(tl.where(broken, at, NOWHERE), 0)
    any_broken = first_broken != NOWHERE
    return tl.where(any_broken, float("nan"), top), tl.where(any_broken, first_broken, index)
