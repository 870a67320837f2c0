"""Packed weights made full again, and activations rounded to fp8, as OpenAI-Triton kernels: both for many tokens.

The weights are those of Packed.full, bit for bit: every rounding is where it has one.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803, N806
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from backend.compute.dense.packed_codes import LEVELS
from backend.compute.quantized.packed import FP8, Packed

ROWS, COLUMNS = 8, 1024
UNIT = 16
"""Columns with one load of their scale, at the most."""


def unpacked(weight: Packed, place: Tensor) -> Tensor:
    """The full weight, in a place [N, K] of its dtype."""
    outputs, width = weight.shape
    group = weight.scheme.columns(width)
    _full_kernel[(triton.cdiv(outputs, ROWS), triton.cdiv(width, COLUMNS))](
        place, weight.codes, weight.scale, weight.offset, outputs,
        WIDTH=width, GROUP=group, UNIT=min(group & -group, UNIT), ROWS=ROWS, COLUMNS=COLUMNS,
        LEVELS=LEVELS[weight.scheme.kind], DIVIDES=weight.divides, num_warps=4,
    )  # fmt: skip
    return place


@triton.jit
def _full_kernel(
    full, codes, scale, offset, outputs,
    WIDTH: tl.constexpr, GROUP: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    LEVELS: tl.constexpr, DIVIDES: tl.constexpr,
):  # fmt: skip
    """UNIT columns, a power of two that divides groups, have one load of a scale."""
    PER: tl.constexpr = 2 if LEVELS == 16 else 1
    UNITS: tl.constexpr = COLUMNS // UNIT
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    at = tl.program_id(1) * (COLUMNS // PER) + tl.arange(0, COLUMNS // PER)[None, :]
    mask = (row < outputs) & (at < WIDTH // PER)
    q = tl.load(codes + row * (WIDTH // PER) + at, mask=mask, other=0.0 if LEVELS == 0 else 0)
    if LEVELS > 0:
        q = q.to(tl.int32)  # which GPUs convert four times as fast as bytes
    if PER == 2:
        q = tl.interleave(q >> 4, q & 15)
    value = tl.reshape(q.to(tl.float32), [ROWS, UNITS, UNIT])
    at = tl.program_id(1) * COLUMNS + tl.arange(0, UNITS)[None, :] * UNIT
    mask = (row < outputs) & (at < WIDTH)
    there = row * (WIDTH // GROUP) + at // GROUP
    step = tl.load(scale + there, mask=mask, other=1.0).to(tl.float32)[:, :, None]
    if offset is None:
        value = (value - LEVELS // 2) * step
    else:
        low = tl.load(offset + there, mask=mask, other=0.0).to(tl.float32)[:, :, None]
        value = tl.div_rn(value, step).to(full.dtype.element_ty).to(tl.float32) if DIVIDES else value * step
        value += low
    at = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    mask = (row < outputs) & (at < WIDTH)
    tl.store(full + row * WIDTH + at, tl.reshape(value.to(full.dtype.element_ty), [ROWS, COLUMNS]), mask=mask)


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """[T, K] -> fp8 [T, K] and the scale of each token, float32 [T, 1]."""
    assert x.is_contiguous()
    tokens, width = x.shape
    codes = torch.empty(tokens, width, dtype=FP8, device=x.device)
    scale = torch.empty(tokens, 1, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(width)
    _round_kernel[(tokens,)](codes, scale, x, WIDTH=width, BLOCK=block, num_warps=min(16, max(1, block // 512)))
    return codes, scale


@triton.jit
def _round_kernel(codes, scale, x, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    token = tl.program_id(0).to(tl.int64)
    part = tl.load(x + token * WIDTH + at, mask=at < WIDTH, other=0.0).to(tl.float32)
    step = tl.maximum(tl.max(tl.abs(part), 0), 1e-12) / 448.0
    tl.store(scale + token, step)
    tl.store(codes + token * WIDTH + at, tl.div_rn(part, step).to(codes.dtype.element_ty), mask=at < WIDTH)
